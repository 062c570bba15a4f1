"""The vision tower against its formulas written plainly; images inside a prompt."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import tiny_config
from tiny_vision import write_tiny_vision

from mlx_dgemma import backends
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.vision import ROOT, read_vision
from mlx_dgemma.errors import (
    CheckpointError,
    ConfigError,
    MediaError,
    SettingsError,
)
from mlx_dgemma.model.loading import load_model
from mlx_dgemma.model.vision import Image

VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 32,
    "standardize": True,
    "use_clipped_linears": True,
}
RNG = np.random.default_rng(4)
KINDS = [(True, True), (False, False)]
SEEN = np.stack(np.meshgrid(np.arange(9), np.arange(6)), axis=-1).reshape(-1, 2)
IMAGE = RNG.random((54, 12)).astype(np.float32), SEEN


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """(standardize, clipped) -> a checkpoint folder."""
    made = {}
    for kind in KINDS:
        changes = dict(zip(("standardize", "use_clipped_linears"), kind, strict=True))
        folder = tmp_path_factory.mktemp("tower") / "m"
        made[kind] = write_tiny_vision(folder, VISION | changes)
    return made


def plain(folder: Path, pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The tower in float64 numpy, head by head and square by square."""
    weights = {
        name.removeprefix(ROOT): np.array(array).astype(np.float64)
        for name, array in mx.load(str(folder / "model.safetensors")).items()
        if name.startswith(ROOT) and "language_model" not in name
    }
    tower = "vision_tower."

    def norm(x: np.ndarray, name: str | None = None) -> np.ndarray:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return y if name is None else y * weights[name]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        low, high = (weights.get(f"{name}.input_{e}") for e in ("min", "max"))
        x = x if low is None else x.clip(low, high)
        y = x @ weights[f"{name}.linear.weight"].T
        low, high = (weights.get(f"{name}.output_{e}") for e in ("min", "max"))
        return y if low is None else y.clip(low, high)

    def rotated(x: np.ndarray) -> np.ndarray:
        y = x.copy()
        for axis, offset in ((0, 0), (1, 4)):  # head_dim 8: two pairs for each axis
            for pair in range(2):
                angle = positions[:, axis] * 100.0 ** (-2 * pair / 4)
                a, b = offset + pair, offset + pair + 2
                y[:, a] = x[:, a] * np.cos(angle) - x[:, b] * np.sin(angle)
                y[:, b] = x[:, b] * np.cos(angle) + x[:, a] * np.sin(angle)
        return y

    def attend(x: np.ndarray, layer: str) -> np.ndarray:
        heads = {}
        for kind in "qkv":
            y = linear(x, f"{layer}self_attn.{kind}_proj")
            heads[kind] = np.split(y, y.shape[-1] // 8, axis=-1)
        outputs = []
        for head, query in enumerate(heads["q"]):
            key, value = heads["k"][head // 2], heads["v"][head // 2]
            query = rotated(norm(query, f"{layer}self_attn.q_norm.weight"))
            key = rotated(norm(key, f"{layer}self_attn.k_norm.weight"))
            scores = np.exp(query @ key.T)
            outputs.append(scores / scores.sum(-1, keepdims=True) @ norm(value))
        return linear(np.concatenate(outputs, -1), f"{layer}self_attn.o_proj")

    def feed(x: np.ndarray, layer: str) -> np.ndarray:
        gate = linear(x, f"{layer}mlp.gate_proj")
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        gated = gate / 2 * (1 + np.tanh(inner)) * linear(x, f"{layer}mlp.up_proj")
        return linear(gated, f"{layer}mlp.down_proj")

    table = weights[f"{tower}patch_embedder.position_embedding_table"]
    x = (2 * pixels.astype(np.float64) - 1) @ weights[
        f"{tower}patch_embedder.input_proj.weight"
    ].T
    x = x + table[0][positions[:, 0]] + table[1][positions[:, 1]]
    for index in range(VISION["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{index}."
        for branch, before, after in (
            (attend, "input", "post_attention"),
            (feed, "pre_feedforward", "post_feedforward"),
        ):
            y = branch(norm(x, f"{layer}{before}_layernorm.weight"), layer)
            x = x + norm(y, f"{layer}{after}_layernorm.weight")
    squares: dict[tuple[int, int], list[np.ndarray]] = {}
    for patch, (column, row) in zip(x, positions, strict=True):
        squares.setdefault((row // 3, column // 3), []).append(patch)
    y = np.stack([np.mean(squares[at], axis=0) for at in sorted(squares)])
    y = y * VISION["hidden_size"] ** 0.5
    if f"{tower}std_bias" in weights:
        y = (y - weights[f"{tower}std_bias"]) * weights[f"{tower}std_scale"]
    return norm(y) @ weights["embed_vision.embedding_projection.weight"].T


def loaded(folder: Path):
    return load_model(folder, read_config(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_its_formulas(towers, kind, tuned):
    model = loaded(towers[kind])
    wanted = plain(towers[kind], *IMAGE)
    for score_bytes in (backends.current().score_bytes, 1):  # whole and in tiles
        tuned(score_bytes=score_bytes)
        found = np.array(model.vision.encode_image(*IMAGE))
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert found.shape == (6, 64)
    tokens = model.vision.tokens
    assert (tokens.image, tokens.begin, tokens.end) == (9, 7, 8)


def test_the_tower_is_read_once_and_only_for_an_image(towers, monkeypatch):
    from mlx_dgemma.model import loading

    read, times = loading.read_vision_weights, []
    monkeypatch.setattr(
        loading, "read_vision_weights", lambda *a: times.append(a) or read(*a)
    )
    model = loaded(towers[KINDS[0]])
    model.encode(mx.array([[3, 4, 5]]), model.make_cache())
    assert not times
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: np.array(model.vision.encode_image(*IMAGE)), range(4))
        )
    assert len(times) == 1
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_embeddings_in_place_of_tokens_read_as_the_tokens(tiny_model):
    """An image of one soft token, equal to an embedding, is that token."""
    model, _ = tiny_model
    tokens = mx.array(RNG.integers(0, 32, (1, 20)).astype(np.int32))
    wanted = np.array(model.encode_hidden(tokens, model.make_cache()))
    other = mx.array(np.where(np.arange(20) % 7 == 3, 5, np.array(tokens)))
    images = [Image(i, model.embed(tokens)[0, i : i + 1]) for i in (3, 10, 17)]
    found = np.array(model.encode_hidden(other, model.make_cache(), images))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_tower_in_16_bits_stays_in_them(tmp_path):
    folder = write_tiny_vision(tmp_path / "m", VISION)
    exact = plain(folder, *IMAGE)
    file = str(folder / "model.safetensors")
    weights = {name: a.astype(mx.bfloat16) for name, a in mx.load(file).items()}
    mx.save_safetensors(file, weights)
    soft = loaded(folder).vision.encode_image(*IMAGE)
    assert soft.dtype == mx.bfloat16
    off = np.abs(np.array(soft.astype(mx.float32)) - exact)
    assert off.max() < 0.1 * np.abs(exact).max()


BIAS = f"{ROOT}vision_tower.std_bias"


def test_a_broken_tower_stops_images_and_not_text(towers, tmp_path):
    folder = shutil.copytree(towers[KINDS[0]], tmp_path / "m")
    file, more = str(folder / "model.safetensors"), f"{ROOT}vision_tower."
    weights = {name: mx.array(a) for name, a in mx.load(file).items()}
    for changes, message in (
        ({BIAS: None}, "missing tensors: .*std_bias"),
        ({f"{more}more": mx.zeros(1)}, "unexpected tensors: .*more"),
        ({BIAS: mx.zeros(3)}, r"std_bias has shape \[3\].*needs \[24\]"),
        ({f"{more}x.scales": mx.zeros(1)}, "quantised vision tower"),
    ):
        changed = (weights | changes).items()
        mx.save_safetensors(file, {n: a for n, a in changed if a is not None})
        model = loaded(folder)
        model.encode(mx.array([[3, 4, 5]]), model.make_cache())
        with pytest.raises(CheckpointError, match=message):
            model.vision.encode_image(*IMAGE)


def test_an_image_the_tower_has_no_room_for_is_refused(towers):
    """MLX checks no index: a gather behind the position table would read on."""
    tower = loaded(towers[KINDS[0]]).vision
    patches, positions = IMAGE
    for moved, why in (
        (positions + 40, "32 positions a side; make the picture squarer"),
        (positions - 1, "32 positions a side"),
        (positions * 2, "contradicts config.json"),
    ):
        with pytest.raises(MediaError, match=why):
            tower.encode_image(patches, moved)
    with pytest.raises(MediaError, match=r"patch_size \d.*contradicts config.json"):
        tower.encode_image(patches[:, :-1], positions)


def test_an_unknown_vision_config_is_refused(tiny):
    for changes, message in (
        ({"head_dim": 6}, "head_dim is 6; must be a multiple of 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple"),
        ({"model_type": "siglip"}, "model_type is 'siglip'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ):
        raw = tiny_config() | {"vision_config": VISION | changes}
        with pytest.raises(ConfigError, match=message):
            read_vision(replace(read_config(tiny), raw=raw), "config.json")


def test_images_that_do_not_fit_leave_the_cache_alone(tiny_model):
    model, _ = tiny_model
    cache = model.make_cache()
    for rows, images in (
        (1, [(3, 2, 64)]),  # behind the tokens
        (1, [(0, 2, 64), (1, 1, 64)]),  # over one another
        (1, [(0, 1, 32)]),  # of another width
        (1, [(1, 0, 64)]),  # of nothing
        (2, [(0, 2, 64)]),  # in two rows
    ):
        tokens = mx.zeros((rows, 4), dtype=mx.int32)
        placed = [Image(start, mx.zeros((n, width))) for start, n, width in images]
        with pytest.raises(SettingsError, match=f"does not fit .* of {rows} × 4 tok"):
            model.encode(tokens, cache, placed)
    assert cache.length == 0
