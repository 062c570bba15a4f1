"""PEFT's folders: what is one adapter, what is two, and what is refused."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters.adapter_files import PREFIX, factors, write_peft
from checkpoint.folders import CANVAS, PROMPT, logits
from mlx.utils import tree_flatten

from mlx_dgemma import generate, load
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.diffusion.sampler import fold
from mlx_dgemma.diffusion.step import State, StepInputs, Stepper
from mlx_dgemma.errors import AdapterError
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


def test_who_wrote_a_folder_is_told_by_its_configuration(config, one, tmp_path):
    assert peft.is_peft(write_peft(tmp_path / "a", {"decoder": one}))
    config = tmp_path / "a" / "adapter_config.json"
    for content in ('{"fine_tune_type": "lora"}', "{", "[]", '{"peft_type": null}'):
        config.write_text(content)
        assert not peft.is_peft(tmp_path / "a")
    assert not peft.is_peft(tmp_path)
    assert not peft.is_peft(tmp_path / "none")


def test_equal_adapters_are_one_in_the_shared_stack(tiny, one, alone, tmp_path):
    modes = {"decoder": one | alone, "encoder": one}
    model = adapted(tiny, write_peft(tmp_path / "a", modes))
    assert model.encoder_layers == tuple(model.layers)
    near(logits(model), logits(added(tiny, one | alone)))
    assert not tree_flatten(model.trainable_parameters())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_adapters_of_low_precision_are_multiplied_in_float32(
    tiny, one, tmp_path, dtype
):
    half = {
        path: tuple(mx.array(side).astype(dtype) for side in pair)
        for path, pair in one.items()
    }
    model = adapted(
        tiny, write_peft(tmp_path / "a", {"decoder": half, "encoder": half})
    )
    floats = {
        path: tuple(np.array(side.astype(mx.float32)) for side in pair)
        for path, pair in half.items()
    }
    near(logits(model), logits(added(tiny, floats)))


def test_a_quantised_model_takes_them_too(tiny, one, other, tmp_path):
    convert(tiny, tmp_path / "q", quantize=True)
    convert(tmp_path / "q", tmp_path / "dense", dequantize=True)
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    ours, cache = hidden(adapted(tmp_path / "q", folder))
    dense = adapted(tmp_path / "dense", folder)
    near(ours, hidden(dense)[0], 1e-4)
    model = adapted(tmp_path / "q", folder)
    near(model.denoise(CANVAS, cache), dense.denoise(CANVAS, cache), 1e-4)


@pytest.mark.parametrize(
    ("written", "scale"),
    [
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
    ],
)
def test_scales_follow_rank_alpha_and_their_patterns(config, tmp_path, written, scale):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    folder = write_peft(tmp_path / "a", {"decoder": layers}, **written)
    (found,) = peft.read(folder, config).decoder.values()
    assert found.scale == pytest.approx(scale, rel=1e-12)
    ((a, b),) = layers.values()
    np.testing.assert_array_equal(np.array(found.a), a.T)
    np.testing.assert_array_equal(np.array(found.b), b.T)


def test_each_layer_may_have_its_own_rank(tiny, config, tmp_path):
    wide = factors(config, ("layers.0.mlp.up_proj",), rank=8)
    narrow = factors(config, ("layers.2.self_attn.q_proj",), rank=2)
    folder = write_peft(
        tmp_path / "a",
        {mode: wide | narrow for mode in ("decoder", "encoder")},
        r=2,
        lora_alpha=2,
        rank_pattern={"up_proj": 8},
        alpha_pattern={"up_proj": 8},
    )
    near(logits(adapted(tiny, folder)), logits(added(tiny, wide | narrow, 1.0)))


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


def test_one_adapter_for_both_or_their_sum_would_be_wrong(tiny, one, other, tmp_path):
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    exact = logits(adapted(tiny, folder))
    both = {p: (np.vstack([one[p][0], other[p][0]]),) for p in one}
    both = {p: (a, np.hstack([one[p][1], other[p][1]])) for p, (a,) in both.items()}
    for wrong in (one, other, both):
        found = logits(added(tiny, wrong))
        assert np.abs(found - exact).max() > 0.1 * np.abs(exact).max()


def test_the_modes_share_every_weight_and_nothing_is_counted_twice(
    tiny, one, other, tmp_path
):
    model = adapted(
        tiny, write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    )
    shared = adapted(tiny, write_peft(tmp_path / "b", {"decoder": one, "encoder": one}))
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert sorted(names) == sorted(n for n, _ in tree_flatten(shared.parameters()))
    assert len(tree_flatten(model.state)) == len(tree_flatten(shared.state))
    own = 0
    for mine, theirs in zip(model.layers, model.encoder_layers, strict=True):
        pairs = [dict(tree_flatten(layer.parameters())) for layer in (mine, theirs)]
        assert pairs[0].keys() == pairs[1].keys()
        for name, array in pairs[0].items():
            assert (array is pairs[1][name]) == ("lora" not in name)
            own += "lora" in name
    assert own == 2 * len(PATHS)
    assert not tree_flatten(model.trainable_parameters())


def test_a_mode_that_lacks_an_adapter_is_told_from_one_that_shares_it(
    config, one, other, alone, tmp_path
):
    still = {path: (a, 0 * b) for path, (a, b) in one.items()}
    first = dict([*one.items()][:1])
    idle = np.ones((3, 64), np.float32), np.zeros((64, 3), np.float32)
    cases = [
        (True, one | alone, one),
        (True, alone, {}),
        (True, alone | still, {}),
        (True, {}, still),
        (True, still, {path: (a, 0 * b) for path, (a, b) in other.items()}),
        (False, one, {}),
        (False, {}, one),
        (False, one, still),
        (False, still, one),
        (True, one | alone, one | {"layers.1.mlp.up_proj": idle}),
        (False, one, first),
        (False, one, other),
        (False, one, one | {PATHS[0]: (one[PATHS[0]][0], other[PATHS[0]][1])}),
        (False, one, one | {PATHS[0]: (one[PATHS[0]][0], 2 * one[PATHS[0]][1])}),
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
def test_text_is_that_of_the_two_modes(tiny, one, other, tmp_path, unfused):
    """Also where steps are compiled, and where they were before the adapter came."""
    folder = write_peft(tmp_path / "a", {"decoder": one, "encoder": other})
    (model, tokenizer), (adapted, _) = load(tiny), load(tiny, folder)
    base = generate(model, tokenizer, "1 2", max_tokens=32, seed=3)
    wanted = generate(adapted, tokenizer, "1 2", max_tokens=32, seed=3)
    assert wanted != base
    keys = np.array([[fold(3, 0, 0, purpose) for purpose in ("propose", "renoise")]])
    numbers = np.array([[0.7, 3.0, 1, 0.1, 0.9, 0]], np.float32)
    dials = StepInputs(mx.array(keys), *mx.array(numbers).T)
    state = State.first(CANVAS[0], 64, mx.float32)
    state = state._replace(signal=mx.random.normal(state.signal.shape))
    cache = hidden(adapted)[1]
    view = adapted.view(cache, 16)
    eager = Stepper(adapted, compiled=False)(state, view, dials, None)[1]
    compiled = Stepper(model, compiled=True)
    early = compiled(state, view, dials, None)[1]
    assert not mx.allclose(early.entropy, eager.entropy, atol=1e-3).item()
    adapters.load(model, folder)
    for stepper in (compiled, Stepper(model, compiled=True)):
        found = stepper(state, view, dials, None)[1]
        np.testing.assert_allclose(found.entropy, eager.entropy, atol=1e-4)
    assert generate(model, tokenizer, "1 2", max_tokens=32, seed=3) == wanted


# Refused


def refused(folder: Path, config, *named: str) -> None:
    with pytest.raises(AdapterError) as caught:
        peft.read(folder, config)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for part in named:
        assert part in message, message


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("use_dora", True, "DoRA"),
        ("bias", "all", "'none'"),
        ("lora_bias", True, "not supported"),
        ("modules_to_save", ["lm_head"], "only adapters"),
        ("fan_in_fan_out", True, "stored that way"),
        ("target_parameters", ["experts.gate_up_proj"], "experts"),
        ("trainable_token_indices", [3], "not supported"),
        ("something_new", {"a": 1}, "not supported"),
        ("init_lora_weights", "pissa", "changes the weights"),
        ("init_lora_weights", ["corda"], "changes the weights"),
        ("r", 0, "from 1"),
        ("r", None, "missing"),
        ("r", "4", "whole number"),
        ("lora_alpha", 0, "above 0"),
        ("lora_alpha", None, "missing"),
        ("use_rslora", "yes", "supported"),
        ("rank_pattern", {"q_proj": "x"}, "whole number"),
        ("rank_pattern", {"q_proj": 4}, "has shape"),
        ("rank_pattern", [3], "object"),
        ("alpha_pattern", {"q_proj": -1}, "above 0"),
        ("alpha_pattern", {"(": 1}, "alpha_pattern holds '('"),
    ],
)
def test_what_is_not_plain_lora_is_refused(config, tmp_path, key, value, named):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    folder = write_peft(tmp_path / "a", {"decoder": layers}, **{key: value})
    about = key if named != "has shape" else "q_proj.lora_A.weight"
    refused(folder, config, about, named)


def test_a_start_that_leaves_the_weights_alone_is_read(config, tmp_path):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    for value in (True, False, "gaussian", "eva", "orthogonal"):
        folder = tmp_path / str(value)
        write_peft(folder, {"decoder": layers}, init_lora_weights=value)
        assert set(peft.read(folder, config).decoder) == set(layers)


STRANGE = [
    "base_model.model.lm_head.lora_A.weight",
    f"{PREFIX}decoder.embed_tokens.lora_embedding_A",
    f"{PREFIX}decoder.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
    f"{PREFIX}decoder.layers.0.self_attn.q_proj.lora_A.bias",
    f"{PREFIX}decoder.layers.0.self_attn.q_proj.base_layer.bias",
    f"{PREFIX}decoder.layers.0.self_attn.q_proj.lora_A.default.weight",
    "decoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.7.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.2.self_attn.v_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.0.experts.lora_A.weight",
    f"{PREFIX}decoder.layers.0.experts.down_proj.lora_A.weight",
    f"{PREFIX}decoder.norm.lora_A.weight",
    f"{PREFIX}encoder.language_model.self_conditioning.up_proj.lora_A.weight",
    f"{PREFIX}encoder.layers.0.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.1.mlp.up_proj.lora_A.weight",
    f"{PREFIX}decoder.layers.1.mlp.up_proj.lora_B.weight",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_tensor_that_belongs_to_no_layer_is_named(config, tmp_path, name):
    layers = factors(config, ("layers.0.self_attn.q_proj",))
    more = {name: mx.ones((3, 64))}
    if not name.endswith("mlp.up_proj.lora_A.weight") and "lora_A" in name:
        more[name.replace("lora_A", "lora_B")] = mx.ones((64, 3))
    folder = write_peft(tmp_path / "a", {"decoder": layers}, more=more)
    module = name.partition(".lora_")[0]
    refused(folder, config, module)


def test_an_adapter_of_another_model_names_tensor_and_shapes(config, tmp_path):
    layers = factors(config, ("layers.0.mlp.down_proj",))
    ((a, b),) = layers.values()
    for number, pair in enumerate([(a[:, :-1], b), (a, b[:-1]), (a[:-1], b)]):
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
    folder = write_peft(tmp_path / "a", {"decoder": one})
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused(folder, config, "adapter_model.safetensors: no such file")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, config, "pickle", "safe_serialization")
    weights.write_bytes(content[:-9])
    with pytest.raises(Exception, match="truncated"):
        peft.read(folder, config)


def test_a_model_takes_one_adapter_only(tiny, one, other, tmp_path):
    cases = {"decoder": one, "encoder": other}, {"encoder": one}, {"decoder": one}
    for number, modes in enumerate(cases):
        folder = write_peft(tmp_path / str(number), modes)
        model = adapted(tiny, folder)
        with pytest.raises(AdapterError, match="already"):
            adapters.load(model, folder)


def test_nothing_is_changed_by_what_is_refused(tiny, one, tmp_path):
    folder = write_peft(tmp_path / "a", {"decoder": one}, use_dora=True)
    model = load_model(tiny, read_config(tiny))
    before = logits(model)
    with pytest.raises(AdapterError, match="DoRA"):
        adapters.load(model, folder)
    np.testing.assert_array_equal(logits(model), before)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"use_dora": 0}))
    adapters.load(model, folder)
    assert np.abs(logits(model) - before).max() > 0.1
