"""Others who use the target while a conversion runs."""

import pytest

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.errors import ConversionError
from mlx_dgemma.model.loading import load_model


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_conversion_is_not_deleted(tiny, tmp_path, overwrite):
    """The target was free when the conversion began; somebody used it meanwhile."""
    out = tmp_path / "out"

    def somebody(name, done, total):
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("ten years of work")

    with pytest.raises(ConversionError, match=r"exists|is no model folder"):
        convert(tiny, out, progress=somebody, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_second_conversion_to_the_same_target_does_not_disturb_the_first(
    tiny, tmp_path
):
    out = tmp_path / "out"
    refused = []

    def again(name, done, total):
        if not refused:
            refused.append(None)
            with pytest.raises(ConversionError, match="another conversion") as error:
                convert(tiny, out)
            refused[0] = str(error.value)

    convert(tiny, out, progress=again)
    assert "out: another conversion to it is running" in refused[0]
    load_model(out, read_config(out))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
