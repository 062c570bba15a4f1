"""Train `sudoku4`, a toy DiffusionGemma that solves 4x4 Sudoku, in transformers.

    python convert/make_tiny.py --train --out DIR
    python convert/train_sudoku.py --evaluate DIR --count 500 --steps 1,2,4,8,24

The model is transformers' own, trained through its own forward. One example is a
prompt of P = 32 tokens and a response of L = 32: 16 digits in four lines, the end of
the turn, then <eos> to the end of the canvas, all of it supervised.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import sudoku
import torch
from tiny_config import generation_config, release_config, write_config, write_json
from tiny_tokenizer import (
    BOS,
    EOS,
    PAD,
    TURN_END,
    VOCAB_SIZE,
    build_tokenizer,
    write_tokenizer,
)
from torch.nn import functional as F
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
)

CANVAS = 32
TEXT = {
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
}
STEPS = 24  # the checkpoint's cap on denoising steps
EPS = 1e-3
SELF_CONDITIONING = 0.5


@dataclass(frozen=True)
class Batch:
    """Prompts (B, P), responses (B, L) and a noise level per example (B,)."""

    prompt: torch.Tensor
    response: torch.Tensor
    level: torch.Tensor


class Coder:
    """Puzzles as token ids: the chat template around them, with thinking off."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.head = self._ids("<bos><|turn>user\n")
        self.tail = self._ids("<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")
        assert self.head[0] == BOS

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def grid(self, cells: np.ndarray) -> np.ndarray:
        """Cells (B, 16) as ids (B, 19): four lines of digits, newlines between."""
        digit, newline = self._ids("0")[0], self._ids("\n")[0]
        lines = np.full((len(cells), 4, 5), newline)
        lines[:, :, :4] = cells.reshape(-1, 4, 4) + digit
        return lines.reshape(-1, 20)[:, :19]

    def prompt(self, puzzles: np.ndarray) -> torch.Tensor:
        """Puzzles (B, 16) -> prompt ids (B, P)."""
        rows = len(puzzles)
        parts = [np.tile(self.head, (rows, 1)), self.grid(puzzles)]
        parts.append(np.tile(self.tail, (rows, 1)))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def response(self, answers: np.ndarray) -> torch.Tensor:
        """Solved grids (B, 16) -> canvases (B, L): the grid, end of turn, fill."""
        canvas = np.full((len(answers), CANVAS), EOS)
        canvas[:, :19] = self.grid(answers)
        canvas[:, 19] = TURN_END
        return torch.from_numpy(canvas)


def batches(size: int, seed: int) -> Iterator[Batch]:
    """Endless training batches of fresh puzzles, the same for the same seed."""
    rng, coder = np.random.default_rng(seed), Coder()
    while True:
        puzzles, answers = sudoku.draw(size, rng)
        level = torch.from_numpy(rng.uniform(EPS, 1, size).astype(np.float32))
        yield Batch(coder.prompt(puzzles), coder.response(answers), level)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits (B, T, V) against targets (B, T), all positions."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(
    model: DiffusionGemmaForBlockDiffusion, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The denoising loss and the encoder's next-token loss of one batch.

    The encoder reads the prompt; the decoder denoises the corrupted response twice,
    the second time seeing its first guess in half of the examples; only then does the
    encoder read the clean response, so that no clean token reaches the decoder.
    """
    clean = batch.response
    replaced = torch.rand(clean.shape) < batch.level[:, None]
    noisy = torch.where(replaced, torch.randint(VOCAB_SIZE, clean.shape), clean)
    cache = DynamicCache(config=model.config.get_text_config())
    encoder = model.model.encoder
    prompt = encoder(input_ids=batch.prompt, past_key_values=cache)
    with torch.no_grad():
        guess = model(past_key_values=cache, decoder_input_ids=noisy).logits
    logits = model(
        past_key_values=cache,
        decoder_input_ids=noisy,
        self_conditioning_logits=guess,
        self_conditioning_mask=torch.rand(len(clean)) < SELF_CONDITIONING,
    ).logits
    denoising = cross_entropy(logits, clean)

    response = encoder(input_ids=clean, past_key_values=cache)
    hidden = torch.cat([prompt.last_hidden_state, response.last_hidden_state], dim=1)
    cap = model.final_logit_softcapping
    logits = cap * torch.tanh(model.lm_head(hidden[:, :-1]) / cap)
    tokens = torch.cat([batch.prompt, clean], dim=1)
    return denoising, cross_entropy(logits, tokens[:, 1:])


def new_model(seed: int) -> DiffusionGemmaForBlockDiffusion:
    """An untrained `sudoku4` in float32: 1.6 M weights, 0.04 M of them vision."""
    torch.manual_seed(seed)
    config = DiffusionGemmaConfig.from_dict(release_config(TEXT, None, CANVAS))
    model = DiffusionGemmaForBlockDiffusion(config)
    encoder, decoder = model.model.encoder.language_model, model.model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            # Heads have unit RMS and attention no scale: start it soft, not one-hot.
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(layer.self_attn.head_dim**-0.25)
        for layer in [*encoder.layers, *decoder.layers]:
            layer.layer_scalar.uniform_(0.8, 1.2)  # not trained; unlike per mode
    return model


def learning_rate(peak: float, step: int, progress: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine to zero as `progress` goes from 0 to 1."""
    warm = min(1, (step + 1) / warm_up)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    out: Path,
    *,
    steps: int = 2000,
    batch: int = 128,
    seed: int = 0,
    minutes: float | None = None,
    peak: float = 2e-3,
    log: Callable[[str], None] = print,
) -> Path:
    """Train `sudoku4` from scratch and write it to the new folder `out`.

    Without `minutes`, the same seed and machine give the same result; with it, the lr
    follows the clock too, and training ends, annealed, after that long at the latest.
    """
    out.mkdir(parents=True)
    model = new_model(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    began, sums, examples = time.perf_counter(), np.zeros(2), batches(batch, seed)
    for step in range(steps):
        elapsed = time.perf_counter() - began
        progress = step / steps
        if minutes is not None:
            progress = max(progress, elapsed / (60 * minutes))
        if progress >= 1:
            break
        optimizer.param_groups[0]["lr"] = learning_rate(peak, step, progress, 100)
        denoising, encoding = losses(model, next(examples))
        (denoising + encoding).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums += denoising.item(), encoding.item()
        if (step + 1) % 20 == 0:
            log(
                f"step {step + 1} denoising {sums[0] / 20:.4f} "
                f"encoder {sums[1] / 20:.4f} seconds {elapsed:.0f}"
            )
            sums[:] = 0
        if (step + 1) % 250 == 0:
            rate, used = solve_rate(model, sudoku.held_out(200, seed=1), STEPS)
            log(f"step {step + 1} solved {rate:.1%} in {used:.2f} steps")
    save(model, out)
    return out


def save(model: DiffusionGemmaForBlockDiffusion, out: Path) -> None:
    """Write model, configs and tokenizer to `out`, in the release's layout."""
    model.save_pretrained(out)
    write_config(out, release_config(TEXT, None, CANVAS), "release", text_only=False)
    write_json(out / "generation_config.json", generation_config(CANVAS, STEPS))
    write_tokenizer(out)


@torch.no_grad()
def solve_rate(
    model: DiffusionGemmaForBlockDiffusion,
    pairs: list[tuple[str, str]],
    steps: int,
    batch: int = 100,
) -> tuple[float, float]:
    """Share of (puzzle, solution) texts solved exactly, and mean steps used.

    Decodes with transformers' `generate` and the checkpoint's sampler, capped at
    `steps` denoising steps. Solved: the canvas up to its first end is the solution.
    """
    model.eval()
    coder = Coder()
    cells = np.array([[[int(c) for c in "".join(t.split())] for t in p] for p in pairs])
    prompts, answers = coder.prompt(cells[:, 0]), coder.response(cells[:, 1])
    config = DiffusionGemmaGenerationConfig(**generation_config(CANVAS, steps))
    length = answers[0].tolist().index(TURN_END) + 1
    solved, used = 0, 0.0
    for at in range(0, len(prompts), batch):
        prompt = prompts[at : at + batch]
        result = model.generate(prompt, generation_config=config)
        canvas = result.sequences[:, prompt.shape[1] :]
        right = canvas[:, :length] == answers[at : at + batch, :length]
        solved += int(right.all(dim=1).sum())
        used += float(((canvas != PAD).sum(dim=1) / result.tokens_per_forward).sum())
    model.train()
    return solved / len(pairs), used / len(pairs)


def evaluate(model_dir: str | Path, n: int, steps: int) -> tuple[float, float]:
    """Solve rate and mean steps of a checkpoint on `n` held-out puzzles."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(model_dir)
    torch.manual_seed(0)
    return solve_rate(model, sudoku.held_out(n), steps)


@click.command()
@click.option("--evaluate", "model_dir", type=click.Path(exists=True), required=True)
@click.option("--count", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--steps", default="1,2,4,8,24", show_default=True)
def main(model_dir: str, count: int, steps: str) -> None:
    """Print the share of COUNT held-out puzzles solved at each number of STEPS."""
    for allowed in map(int, steps.split(",")):
        rate, used = evaluate(model_dir, count, allowed)
        click.echo(f"steps {allowed:2d}  solved {rate:6.1%}  used {used:.2f}")


if __name__ == "__main__":
    main()
