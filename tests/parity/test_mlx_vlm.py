"""Files that mlx-vlm converts load here, ours load in mlx-vlm, and logits agree."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import convert
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.model.language import DiffusionGemma
from mlx_dgemma.model.loading import load_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ALLOWED = 1e-3
# wide enough for groups of 64; mlx-vlm's tower lacks the release's standardisation
SHAPE = {
    "text": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
    },
    "vision": {"standardize": False},
}
RNG = np.random.default_rng(0)
# ids from 10 up: mlx-vlm embeds the image token, 9, as padding
PROMPT = mx.array(RNG.integers(10, 32, (1, 20)).astype(np.int32))  # window is 8
CANVAS = mx.array(RNG.integers(10, 32, (1, 32)).astype(np.int32))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from make_tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("vlm") / "source", **SHAPE)


def _ours(path) -> np.ndarray:
    model = load_model(path, read_config(path))
    cache = model.make_cache()
    model.encode(PROMPT, cache)
    return np.array(model.denoise(CANVAS, cache).astype(mx.float32))


def _theirs(path) -> np.ndarray:
    from mlx_vlm.utils import load_model as load_theirs

    model = load_theirs(path)
    _, cache = model.model.encoder(PROMPT, cache=model.make_cache())
    output = model.language_model(inputs=None, cache=cache, canvas_ids=CANVAS)
    return np.array(output.logits)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"quantize": True},  # mlx-vlm's recipe: experts 4 bit, the rest 8
        {"quantize": True, "q_mode": "mxfp4", "q_group_size": 32, "q_bits": 4},
        {"quantize": True, "q_bits": 3},
    ],
    ids=str,
)
def test_their_conversion_loads_here(source, tmp_path, how):
    from mlx_vlm.convert import convert as convert_theirs

    out = tmp_path / "theirs"
    convert_theirs(str(source), str(out), dtype="float32", **how)
    np.testing.assert_allclose(_ours(out), _theirs(out), atol=ALLOWED)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"quantize": True, "q_bits": 8, "q_group_size": 32},
        {"quantize": True, "quant_predicate": "mixed", "q_mode": "affine"},
        *(
            {"quantize": True, "quant_predicate": recipe, "q_mode": mode}
            for recipe in ("mixed", "uniform")
            for mode in ("mxfp4", "mxfp8", "nvfp4")
        ),
    ],
    ids=str,
)
def test_our_conversion_loads_there(source, tmp_path, how, monkeypatch):
    out = tmp_path / "ours"
    convert(source, out, **how)
    if how.get("quant_predicate") == "uniform":
        # mlx-vlm computes from bfloat16 embeddings in these modes; so must we, here
        embed = DiffusionGemma.embed
        scale = mx.array(128**0.5, dtype=mx.bfloat16)

        def rounded(self, tokens):
            exact = embed(self, tokens) / 128**0.5
            return (exact.astype(mx.bfloat16) * scale).astype(mx.float32)

        monkeypatch.setattr(DiffusionGemma, "embed", rounded)
    np.testing.assert_allclose(_ours(out), _theirs(out), atol=ALLOWED)


def test_our_conversion_of_layers_of_odd_size_loads_there(tmp_path):
    """5 experts x 96: mlx-vlm keeps a layer whose size is no multiple of 64 dense."""
    from make_tiny import make_checkpoint

    text = {"hidden_size": 96, "num_experts": 5}
    source = make_checkpoint(tmp_path / "source", text=text, vision=SHAPE["vision"])
    convert(source, tmp_path / "ours", quantize=True, q_bits=8, q_group_size=32)
    theirs = _theirs(tmp_path / "ours")
    np.testing.assert_allclose(_ours(tmp_path / "ours"), theirs, atol=ALLOWED)
