"""convert/verify.py passes on a right conversion and fails after one small change."""

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dgemma import convert

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

WRONG = (
    "model.encoder.language_model.layers.1.layer_scalar",
    "model.decoder.layers.2.router.per_expert_scale",
    "model.decoder.layers.0.self_attn.k_norm.weight",
)


def verify(*arguments) -> tuple[int, str]:
    from verify import main

    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("layout", ["release", "transformers"])
def test_both_layouts_pass_and_one_change_fails(checkpoint, tmp_path, layout):
    path = checkpoint(layout=layout)
    convert(path, tmp_path / "ours")
    code, output = verify("--hf-path", path, "--mlx-path", tmp_path / "ours")
    assert code == 0, output
    assert "18 of 18 agree" in output and "DIFFERS" not in output
    for number, name in enumerate(WRONG):
        wrong = tmp_path / str(number)
        convert(path, wrong)
        weights = mx.load(str(wrong / "model.safetensors"))
        values = weights[name].tolist()
        values[0] *= 1.02
        weights[name] = mx.array(values)
        mx.save_safetensors(str(wrong / "model.safetensors"), weights)
        code, output = verify("--hf-path", path, "--mlx-path", wrong)
        assert code == 1 and "DIFFERS" in output, name


def test_sixteen_bit_files_are_verified_in_float32(checkpoint):
    path = checkpoint(dtype="bfloat16", seed=3)
    assert verify("--hf-path", path)[0] == 0


def test_quantised_files_are_refused(checkpoint, tmp_path):
    path = checkpoint()
    convert(path, tmp_path / "q", quantize=True, q_bits=8)
    code, output = verify("--hf-path", path, "--mlx-path", tmp_path / "q")
    assert code == 1 and "differs by design" in output
