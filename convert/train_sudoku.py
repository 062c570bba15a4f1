"""Train `sudoku4`, a toy DiffusionGemma that solves 4x4 Sudoku, in transformers.

    python convert/train_sudoku.py --out DIR

The model is transformers' own, trained through its own forward. One example is a
prompt of P = 32 tokens and a response of L = 32: 16 digits in four lines, the end of
the turn, then <eos> to the end of the canvas, all of it supervised.
"""

import math
import time
from pathlib import Path

import click
import numpy as np
import sudoku
import torch
from oracle import CACHE
from torch.nn import functional as F
from toy import (
    EOS,
    PAD,
    TURN_END,
    VOCAB_SIZE,
    build_tokenizer,
    generation_config,
    release_config,
    write_files,
)
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
)

CANVAS = 32
CONFIG = release_config(
    {
        "hidden_size": 128,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "sliding_window": 16,
    },
    canvas_length=CANVAS,
)
STEPS = 24  # the checkpoint's limit of denoising steps
EPS = 1e-3
SELF_CONDITIONING = 0.5
PEAK_RATE = 2e-3
TOKENIZER = build_tokenizer()


def ids(texts: list[str]) -> torch.Tensor:
    encoded = TOKENIZER.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([one.ids for one in encoded])


def prompts(puzzles: list[str]) -> torch.Tensor:
    """Return (B, P) ids in the chat template, with thinking off."""
    after = "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    return ids([f"<bos><|turn>user\n{puzzle}{after}" for puzzle in puzzles])


def responses(solutions: list[str]) -> torch.Tensor:
    """Return (B, L) canvases: the grid, the end of the turn, then <eos>."""
    tokens = ids([solution + "<turn|>" for solution in solutions])
    return F.pad(tokens, (0, CANVAS - tokens.shape[1]), value=EOS)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over all positions of logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(
    model: DiffusionGemmaForBlockDiffusion,
    prompt: torch.Tensor,
    clean: torch.Tensor,
    level: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the denoising loss and the encoder's next-token loss of one batch.

    Prompts (B, P), responses (B, L), noise levels (B,). The encoder reads the prompt.
    The decoder denoises the corrupted response twice, the second time with its first
    guess as signal in half of the examples. Only then does the encoder read the clean
    response, so no clean token reaches the decoder.
    """
    replaced = torch.rand(clean.shape) < level[:, None]
    noisy = torch.where(replaced, torch.randint(VOCAB_SIZE, clean.shape), clean)
    cache = {CACHE: DynamicCache(config=model.config.get_text_config())}
    before = model.model.encoder(input_ids=prompt, **cache)
    with torch.no_grad():
        guess = model(decoder_input_ids=noisy, **cache).logits
    logits = model(
        decoder_input_ids=noisy,
        self_conditioning_logits=guess,
        self_conditioning_mask=torch.rand(len(clean)) < SELF_CONDITIONING,
        **cache,
    ).logits
    after = model.model.encoder(input_ids=clean, **cache)
    hidden = torch.cat([before.last_hidden_state, after.last_hidden_state], dim=1)
    cap = model.final_logit_softcapping
    encoded = cap * torch.tanh(model.lm_head(hidden[:, :-1]) / cap)
    targets = torch.cat([prompt, clean], dim=1)[:, 1:]
    return cross_entropy(logits, clean), cross_entropy(encoded, targets)


def new_model(seed: int) -> DiffusionGemmaForBlockDiffusion:
    """Return an untrained `sudoku4` in float32: 1.6 M weights."""
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig.from_dict(CONFIG)
    model = DiffusionGemmaForBlockDiffusion(config)
    encoder, decoder = model.model.encoder.language_model, model.model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            # heads have unit RMS and attention no scale: start it soft, not one-hot
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(layer.self_attn.head_dim**-0.25)
        for layer in [*encoder.layers, *decoder.layers]:
            layer.layer_scalar.uniform_(0.8, 1.2)  # not trained; differs per mode
    return model


def train(out: Path, steps: int, batch: int, seed: int) -> None:
    """Train `sudoku4` from scratch and write it to the new folder `out`.

    AdamW; 100 steps of linear warm-up, then a cosine to zero.
    """
    out.mkdir(parents=True)
    model, rng = new_model(seed), np.random.default_rng(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    began, sums = time.perf_counter(), np.zeros(2)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / 100) * cosine
        grids = sudoku.draw(batch, rng)
        puzzles, solutions = ([sudoku.text(one) for one in cells] for cells in grids)
        level = torch.from_numpy(rng.uniform(EPS, 1, batch).astype(np.float32))
        both = losses(model, prompts(puzzles), responses(solutions), level)
        sum(both).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums += [loss.item() for loss in both]
        if (step + 1) % 20 == 0:
            seconds = time.perf_counter() - began
            click.echo(
                f"step {step + 1} denoising {sums[0] / 20:.4f} "
                f"encoder {sums[1] / 20:.4f} seconds {seconds:.0f}"
            )
            sums[:] = 0
        if (step + 1) % 250 == 0:
            rate, used = solve_rate(model, sudoku.held_out(200, seed=1), STEPS)
            click.echo(f"step {step + 1} solved {rate:.1%} in {used:.2f} steps")
    model.save_pretrained(out)
    write_files(out, CONFIG, steps=STEPS)


@torch.no_grad()
def solve_rate(
    model: DiffusionGemmaForBlockDiffusion, pairs: list[tuple[str, str]], steps: int
) -> tuple[float, float]:
    """Return the share of (puzzle, solution) texts solved, and mean steps used.

    transformers' `generate` with the checkpoint's sampler and at most `steps`
    denoising steps. Solved: the canvas up to its first end is the solution.
    """
    model.eval()
    puzzles, solutions = zip(*pairs, strict=True)
    asked, answers = prompts(puzzles), responses(solutions)
    config = DiffusionGemmaGenerationConfig(**generation_config(CANVAS, steps))
    length = answers[0].tolist().index(TURN_END) + 1
    solved, used = 0, 0.0
    for prompt, answer in zip(asked.split(100), answers.split(100), strict=True):
        result = model.generate(prompt, generation_config=config)
        canvas = result.sequences[:, prompt.shape[1] :]
        right = canvas[:, :length] == answer[:, :length]
        solved += int(right.all(dim=1).sum())
        used += float(((canvas != PAD).sum(dim=1) / result.tokens_per_forward).sum())
    model.train()
    return solved / len(pairs), used / len(pairs)


def evaluate(model_dir: str | Path, n: int, steps: int) -> tuple[float, float]:
    """Return solve rate and mean steps of a checkpoint on `n` held-out puzzles."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(model_dir)
    torch.manual_seed(0)
    return solve_rate(model, sudoku.held_out(n), steps)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--updates", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out, batch, updates, seed):
    """Train sudoku4, about an hour on one core, and write it to the folder OUT."""
    train(out, updates, batch, seed)


if __name__ == "__main__":
    main()
