"""PEFT's folders: what is one adapter, what is two, and what is refused."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters.adapter_files import PREFIX, factors, write_peft
from checkpoint.folders import CANVAS, PROMPT, logits, refusal
from mlx.utils import tree_flatten

from mlx_dgemma import generate, load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.model.loading import find_layer, load_model

PATHS = (
    *(f"layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qko"),
    "layers.0.self_attn.v_proj",
    "layers.1.mlp.gate_proj",
    "layers.2.mlp.up_proj",
    "layers.0.mlp.down_proj",
    "layers.1.router.proj",
)
ALONE = tuple(f"self_conditioning.{part}_proj" for part in ("gate", "up", "down"))
SCALE = 6 / 3  # what write_peft says of alpha and r


@pytest.fixture(scope="module")
def config(tiny):
    return read_config(tiny)


@pytest.fixture(scope="module")
def one(config):
    return factors(config, PATHS)


@pytest.fixture(scope="module")
def other(config):
    return factors(config, PATHS, seed=1)


@pytest.fixture(scope="module")
def alone(config):
    return factors(config, ALONE, seed=2)


def adapted(tiny: Path, folder: Path):
    model = load_model(tiny, read_config(tiny))
    adapters.load(model, folder)
    return model


def added(tiny: Path, layers: dict, scale: float = SCALE):
    """The model with the deltas in its dense weights."""
    model = load_model(tiny, read_config(tiny))
    for path, (a, b) in layers.items():
        parent, name = find_layer(model, path)
        parent[name].weight = parent[name].weight + mx.array(scale * b @ a)
    return model


def near(ours, theirs, allowed: float = 2e-5) -> None:
    ours, theirs = np.array(ours), np.array(theirs)
    assert np.abs(ours - theirs).max() < allowed * np.abs(theirs).max()


def hidden(model):
    """Of the prompt, encoded, and the cache that was written."""
    cache = model.make_cache()
    return model.encode_hidden(PROMPT, cache), cache


# One adapter


def test_equal_adapters_are_one_in_the_shared_stack(tiny, one, alone, tmp_path):
    modes = {"decoder": one | alone, "encoder": one}
    model = adapted(tiny, write_peft(tmp_path / "a", modes))
    assert model.encoder_layers == tuple(model.layers)
    near(logits(model), logits(added(tiny, one | alone)))
    assert not tree_flatten(model.trainable_parameters())


def test_adapters_of_low_precision_are_multiplied_in_float32(tiny, one, tmp_path):
    half, exact = {}, {}
    for path, pair in one.items():
        half[path] = [mx.array(side).astype(mx.bfloat16) for side in pair]
        exact[path] = [np.array(side.astype(mx.float32)) for side in half[path]]
    folder = write_peft(tmp_path / "a", {"decoder": half, "encoder": half})
    near(logits(adapted(tiny, folder)), logits(added(tiny, exact)))


def test_a_quantised_model_takes_them_too(tiny, quantised, one, other, tmp_path):
    convert(quantised, tmp_path / "dense", dequantize=True)
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    model, dense = adapted(quantised, folder), adapted(tmp_path / "dense", folder)
    (ours, cache), (theirs, _) = hidden(model), hidden(dense)
    near(ours, theirs, 1e-4)
    near(model.denoise(CANVAS, cache), dense.denoise(CANVAS, cache), 1e-4)


SCALES: list[tuple[dict[str, Any], float]] = [
    ({}, 2.0),
    ({"lora_alpha": 1.5}, 0.5),
    ({"use_rslora": True}, 6 / math.sqrt(3)),
    ({"alpha_pattern": {"q_proj": 9}}, 3.0),
    ({"alpha_pattern": {r"layers\.0.*": 9, "q_proj": 1}}, 3.0),
    ({"alpha_pattern": {"^model.decoder.layers.0.self_attn.q_proj": 9}}, 3.0),
    ({"alpha_pattern": {"proj": 9, "decoder": 9, "1.self_attn.q_proj": 9}}, 2.0),
    ({"r": 5, "rank_pattern": {"q_proj": 3}}, 2.0),
    ({"r": 5, "rank_pattern": {r".*\.0\..*": 3}, "use_rslora": True}, 6 / 3**0.5),
    ({"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 1}}, 2.0),
]


def test_scales_follow_rank_alpha_and_their_patterns(tiny, config, tmp_path):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    ((a, b),) = layers.values()
    for number, (written, scale) in enumerate(SCALES):
        folder = write_peft(tmp_path / str(number), {"decoder": layers}, **written)
        (found,) = peft.read(folder, config).decoder.values()
        assert found.scale == pytest.approx(scale, rel=1e-12)
        np.testing.assert_array_equal(np.array(found.a), a.T)
        np.testing.assert_array_equal(np.array(found.b), b.T)
    # each layer may have its own rank
    both = factors(config, ("layers.0.mlp.up_proj",), rank=8)
    both |= factors(config, ("layers.2.self_attn.q_proj",), rank=2)
    modes, eight = {"decoder": both, "encoder": both}, {"up_proj": 8}
    written = {"rank_pattern": eight, "alpha_pattern": eight, "r": 2, "lora_alpha": 2}
    folder = write_peft(tmp_path / "a", modes, **written)
    near(logits(adapted(tiny, folder)), logits(added(tiny, both, 1.0)))


# Two adapters


@pytest.mark.parametrize("lacking", ["nothing", "decoder", "encoder"])
def test_each_mode_runs_with_its_own_adapter(
    tiny, one, other, alone, tmp_path, lacking
):
    decoder = alone if lacking == "decoder" else one | alone
    encoder = {} if lacking == "encoder" else other
    folder = write_peft(tmp_path / "a", {"decoder": decoder, "encoder": encoder})
    model = adapted(tiny, folder)
    assert model.encoder_layers[0] is not model.layers[0]
    truly, read = added(tiny, decoder), added(tiny, encoder)
    states, cache = hidden(read)
    near(hidden(model)[0], states)
    signal = read.self_condition(read.denoise(CANVAS, cache))
    ours = hidden(model)[1]
    near(model.denoise(CANVAS, ours, signal), truly.denoise(CANVAS, cache, signal))
    quick = model.make_cache()
    model.encode(PROMPT, quick)
    near(model.denoise(CANVAS, quick, signal), model.denoise(CANVAS, ours, signal))


def test_the_modes_share_every_weight_and_nothing_is_counted_twice(
    tiny, one, other, tmp_path
):
    model, shared = (
        adapted(tiny, write_peft(tmp_path / name, {"decoder": one, "encoder": encoder}))
        for name, encoder in (("a", other), ("b", one))
    )
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert names == {name for name, _ in tree_flatten(shared.parameters())}
    assert len(tree_flatten(model.state)) == len(tree_flatten(shared.state))
    for mine, theirs in zip(model.layers, model.encoder_layers, strict=True):
        encoder = dict(tree_flatten(theirs.parameters()))
        for name, array in tree_flatten(mine.parameters()):
            assert (array is encoder[name]) == ("lora" not in name)
    assert not tree_flatten(model.trainable_parameters())


def test_a_mode_that_lacks_an_adapter_is_told_from_one_that_shares_it(
    config, one, other, alone, tmp_path
):
    still = {path: (a, 0 * b) for path, (a, b) in one.items()}
    first = dict([*one.items()][:1])
    idle = np.ones((3, 64), np.float32), np.zeros((64, 3), np.float32)
    twice = one | {PATHS[0]: (one[PATHS[0]][0], 2 * one[PATHS[0]][1])}
    cases = [
        *((True, one | alone, one), (True, alone, {}), (True, alone | still, {})),
        *((True, {}, still), (True, one, one | {"layers.1.mlp.up_proj": idle})),
        *((False, one, {}), (False, {}, one), (False, one, still), (False, still, one)),
        *((False, one, first), (False, one, other), (False, one, twice)),
    ]
    for number, (shared, decoder, encoder) in enumerate(cases):
        modes = {"decoder": decoder, "encoder": encoder}
        folder = write_peft(tmp_path / str(number), modes)
        assert peft.read(folder, config).shared == shared, number
    modes = {"decoder": one, "encoder": one}
    pattern = {"model.encoder.*q_proj": 7}
    folder = write_peft(tmp_path / "scaled", modes, alpha_pattern=pattern)
    assert not peft.read(folder, config).shared


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_changes_a_model_in_use(
    tiny, one, other, tmp_path, unfused, tuned, compiled
):
    """Steps that were compiled before the adapter came are compiled again."""
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    (model, tokenizer), (wanted, _) = load(tiny), load(tiny, folder)

    def text(model) -> str:
        return generate(model, tokenizer, "1 2", max_tokens=32, seed=3)

    tuned(compiles=compiled)
    base = text(model)
    adapters.load(model, folder)
    assert text(model) == text(wanted) != base


# Refused


def refused(folder: Path, config, *named: str) -> None:
    message = refusal(peft.read, folder, config)
    for part in (str(folder), *named):
        assert part in message, message


NOT_PLAIN: list[tuple[str, Any, str]] = [
    ("peft_type", "IA3", "'LORA'"),
    ("use_dora", True, "DoRA"),
    ("bias", "all", "'none'"),
    ("lora_bias", True, "not supported"),
    ("modules_to_save", ["lm_head"], "only adapters"),
    ("fan_in_fan_out", True, "stored that way"),
    ("target_parameters", ["experts.gate_up_proj"], "experts"),
    ("something_new", {"a": 1}, "not supported"),
    ("init_lora_weights", "pissa", "changes the weights"),
    ("init_lora_weights", ["corda"], "changes the weights"),
    ("r", 0, "from 1"),
    ("r", None, "missing"),
    ("lora_alpha", 0, "above 0"),
    ("use_rslora", "yes", "supported"),
    ("rank_pattern", {"q_proj": "x"}, "whole number"),
    ("rank_pattern", {"q_proj": 4}, "has shape"),
    ("rank_pattern", [3], "object"),
    ("alpha_pattern", {"q_proj": -1}, "above 0"),
    ("alpha_pattern", {"(": 1}, "alpha_pattern holds '('"),
]


def test_what_is_not_plain_lora_is_refused(config, tmp_path):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    for number, (key, value, named) in enumerate(NOT_PLAIN):
        folder = write_peft(tmp_path / str(number), {"decoder": layers}, **{key: value})
        about = key if named != "has shape" else "q_proj.lora_A.weight"
        refused(folder, config, about, named)
    for value in (True, False, "gaussian", "eva", "orthogonal"):
        folder = tmp_path / str(value)
        write_peft(folder, {"decoder": layers}, init_lora_weights=value)
        assert set(peft.read(folder, config).decoder) == set(layers)


LAYER_0, LAYER_1 = f"{PREFIX}decoder.layers.0", f"{PREFIX}decoder.layers.1"
STRANGE = [
    "base_model.model.lm_head.lora_A.weight",
    f"{PREFIX}decoder.embed_tokens.lora_embedding_A",
    f"{LAYER_0}.self_attn.q_proj.lora_magnitude_vector.weight",
    f"{LAYER_0}.self_attn.q_proj.lora_A.bias",
    f"{LAYER_0}.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.7.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.2.self_attn.v_proj.lora_A.weight",
    f"{LAYER_0}.experts.down_proj.lora_A.weight",
    f"{PREFIX}decoder.norm.lora_A.weight",
    f"{PREFIX}encoder.language_model.self_conditioning.up_proj.lora_A.weight",
    f"{LAYER_1}.mlp.up_proj.lora_A.weight",
    f"{LAYER_1}.mlp.up_proj.lora_B.weight",
]


def test_a_tensor_that_belongs_to_no_layer_is_named(config, tmp_path):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    for number, name in enumerate(STRANGE):
        more = {name: mx.ones((3, 64))}
        if not name.endswith("mlp.up_proj.lora_A.weight") and "lora_A" in name:
            more[name.replace("lora_A", "lora_B")] = mx.ones((64, 3))
        folder = write_peft(tmp_path / str(number), {"decoder": layers}, more=more)
        refused(folder, config, name.partition(".lora_")[0])


def test_an_adapter_of_another_model_names_tensor_and_shapes(config, tmp_path):
    layers = factors(config, ("layers.0.mlp.down_proj",))
    ((a, b),) = layers.values()
    for number, pair in enumerate([(a[:, :-1], b), (a, b[:-1])]):
        wrong = {"layers.0.mlp.down_proj": pair}
        folder = write_peft(tmp_path / str(number), {"encoder": wrong})
        refused(folder, config, "down_proj.lora_", "has shape [")
    whole = {path: (a.astype(np.int32), b) for path in layers}
    refused(write_peft(tmp_path / "ints", {"decoder": whole}), config, "not floats")


def test_vision_is_let_pass_only_if_it_adds_nothing(config, one, tmp_path):
    name = f"{PREFIX}encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear"
    more = {f"{name}.lora_A.weight": mx.ones((3, 8))}
    still = more | {f"{name}.lora_B.weight": mx.zeros((5, 3))}
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": one}, more=still)
    assert peft.read(folder, config).decoder.keys() == one.keys()
    moved = more | {f"{name}.lora_B.weight": mx.ones((5, 3))}
    refused(write_peft(tmp_path / "b", {"decoder": one}, more=moved), config, "vision")
    refused(write_peft(tmp_path / "c", {}, more=still), config, "no adapter")


def test_files_that_are_missing_or_torn_are_named(config, one, tmp_path):
    assert not peft.is_peft(tmp_path)
    folder = write_peft(tmp_path / "a", {"decoder": one})
    assert peft.is_peft(folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(folder, config, "truncated")
    weights.unlink()
    refused(folder, config, "adapter_model.safetensors: no such file")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, config, "pickle", "safe_serialization")
    for content in ('{"fine_tune_type": "lora"}', "{", "[]", '{"peft_type": null}'):
        (folder / "adapter_config.json").write_text(content)
        assert not peft.is_peft(folder)


def test_a_model_takes_one_adapter_only(tiny, one, other, tmp_path):
    for number, modes in enumerate(
        ({"decoder": one, "encoder": other}, {"encoder": one})
    ):
        folder = write_peft(tmp_path / str(number), modes)
        assert "already" in refusal(adapters.load, adapted(tiny, folder), folder)
