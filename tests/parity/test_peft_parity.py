"""Adapters of PEFT against transformers, encoder and decoder with their own.

transformers in float64 is the truth: its tied weights are untied and each mode's delta
is added to its own, or PEFT itself runs the adapter it saves. Ours is float32, loaded
from the folder. Routing ties, where rounding sends a token elsewhere, are refused by
the test itself.
"""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters.adapter_files import factors, write_peft

from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.model.loading import load_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ALLOWED = 1e-4  # relative, of the largest
TIED = 1e-5
S, F = "sliding_attention", "full_attention"
PARTS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    "router.proj",
)
ALONE = tuple(f"self_conditioning.{part}_proj" for part in ("gate", "up", "down"))
# layers, hidden size, rank, alpha, rank-stabilised, prefix, canvas
SHAPES = [
    ([S, S, F], 64, 4, 8, False, 11, 16),
    ([S, F], 48, 3, 5, True, 5, 8),
    ([S, F, S, F], 64, 8, 16, False, 30, 12),
    ([F], 64, 1, 2, True, 9, 16),
]


def paths_of(config) -> tuple[str, ...]:
    return tuple(
        f"layers.{index}.{part}"
        for index, kind in enumerate(config.layers)
        for part in PARTS
        if kind.sliding or "v_proj" not in part
    )


def add(stack, layers, scale: float) -> None:
    """Untie the weights of some layers of one mode and add their deltas."""
    import torch

    for path, (a, b) in layers.items():
        linear = stack.get_submodule(path)
        delta = scale * torch.tensor(b, dtype=torch.float64) @ torch.tensor(a).double()
        linear.weight = torch.nn.Parameter(linear.weight.detach() + delta)


def truth(oracle, prompt, canvas, *, ties=False):
    """Encoder states, logits and conditioned logits; no routing ties unless allowed."""
    with oracle.watch_routing() as gaps:
        states, cache = oracle.encode(prompt)
        first = oracle.denoise(canvas, cache)
        second = oracle.denoise(canvas, cache, first / 0.65)
    closest = min(map(np.min, gaps), default=1.0)
    assert ties or closest > TIED, "a routing tie: choose another seed"
    return states, first, second


def ours(model, prompt, canvas, first):
    """The same of ours, conditioned on transformers' logits."""
    cache = model.make_cache()
    states = model.encode_hidden(mx.array(prompt.astype(np.int32)), cache)
    ids = mx.array(canvas.astype(np.int32))
    signal = model.self_condition(mx.array((first / 0.65).astype(np.float32)))
    return states, model.denoise(ids, cache), model.denoise(ids, cache, signal)


def errors(found, wanted) -> list[float]:
    """The largest difference of each array, relative to its largest number."""
    return [
        float(np.abs(np.array(mine) - right).max() / np.abs(right).max())
        for mine, right in zip(found, wanted, strict=True)
    ]


def assert_ours_agrees(path, config, folder, given, wanted) -> None:
    model = load_model(path, config)
    adapters.load(model, folder)
    assert max(errors(ours(model, *given, wanted[1]), wanted)) <= ALLOWED


def case(folder: Path, number: int):
    """Checkpoint, its configuration, and ids of a prompt and a canvas."""
    from make_tiny import make_checkpoint

    kinds, width, *_, prefix, length = SHAPES[number]
    text = {"layer_types": kinds, "hidden_size": width, "sliding_window": 8}
    layout = ["release", "transformers"][number % 2]
    make_checkpoint(folder, seed=number, layout=layout, text=text, canvas_length=length)
    config, rng = read_config(folder), np.random.default_rng(number)
    sizes = (2, prefix), (2, length)
    return config, [rng.integers(0, config.vocab_size, size) for size in sizes]


@pytest.mark.parametrize(
    ("number", "lacking"),
    [(0, "nothing"), (1, "encoder"), (2, "decoder"), (3, "nothing")],
)
def test_each_mode_has_its_own_delta(tmp_path, number, lacking):
    from oracle import load_oracle

    _, _, rank, alpha, rooted, *_ = SHAPES[number]
    path = tmp_path / "m"
    config, given = case(path, number)
    decoder = factors(config, paths_of(config) + ALONE, rank=rank, seed=1)
    encoder = factors(config, paths_of(config), rank=rank, seed=2)
    modes = {"decoder": decoder, "encoder": encoder}
    modes.pop(lacking, None)
    folder = write_peft(
        tmp_path / "a", modes, r=rank, lora_alpha=alpha, use_rslora=rooted
    )
    scale = alpha / (math.sqrt(rank) if rooted else rank)

    oracle, same = (load_oracle(path, "float64") for _ in range(2))
    stacks = [(o.model.model.decoder, o.model.model.encoder) for o in (oracle, same)]
    base = truth(oracle, *given, ties=True)
    add(stacks[0][0], modes.get("decoder", {}), scale)
    add(stacks[0][1].language_model, modes.get("encoder", {}), scale)
    wanted = truth(oracle, *given)

    assert_ours_agrees(path, config, folder, given, wanted)
    moved = errors(base, wanted)
    assert (moved[0] > 0.01) == (lacking != "encoder") and min(moved[1:]) > 0.01

    # what one weight of both deltas would say
    for mode in modes.values():
        add(stacks[1][0], mode, scale)
        shared = {p: pair for p, pair in mode.items() if p.startswith("layers.")}
        add(stacks[1][1].language_model, shared, scale)
    both = truth(same, *given, ties=True)
    assert max(errors(both, wanted)) > 100 * ALLOWED


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_folder_that_peft_itself_saved(tmp_path, number):
    import peft
    import torch
    from oracle import load_oracle

    _, _, rank, alpha, rooted, *_ = SHAPES[number]
    path = tmp_path / "m"
    config, given = case(path, number)
    oracle = load_oracle(path, "float64")
    wanted_layers = "|".join(part.rpartition(".")[2] for part in (*PARTS, *ALONE))
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rooted,
        target_modules=rf".*(language_model|decoder)\..*\.({wanted_layers})",
        rank_pattern={"decoder.layers.0.self_attn.q_proj": rank + 1},
        alpha_pattern={"mlp.down_proj": alpha / 2},
        lora_dropout=0.1,
    )
    wrapped = peft.get_peft_model(oracle.model, settings, autocast_adapter_dtype=False)
    torch.manual_seed(number)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            values = torch.randn(weight.shape).float() / weight.shape[1] ** 0.5
            weight.data.copy_(values)
    wrapped.eval()
    wanted = truth(oracle, *given)
    float32 = {name: w.float() for name, w in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path / "a", state_dict=float32)

    assert_ours_agrees(path, config, tmp_path / "a", given, wanted)
