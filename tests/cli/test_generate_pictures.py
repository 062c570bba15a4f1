"""`mlx_dgemma.generate --image`: pictures on the command line."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from tiny_vision import drawn, write_tiny_vision

from mlx_dgemma.cli.generate import main

QUICK = ["--seed", "0", "--max-tokens", "16", "--steps", "3", "--prompt", "abc"]


@pytest.fixture(scope="module")
def eyed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eyed")
    for seed in (0, 1):
        drawn(60, 40, seed).save(folder / f"{seed}.png")
    return write_tiny_vision(folder / "m").parent


def run(folder, *given):
    return CliRunner().invoke(main, ["--model", str(folder / "m"), *QUICK, *given])


def test_pictures_stand_in_front_of_the_prompt_in_order(eyed):
    one, other = str(eyed / "0.png"), str(eyed / "1.png")
    sizes = {}
    for given in ((), ("--image", one), ("--image", one, "--image", other)):
        ended = run(eyed, *given)
        assert ended.exit_code == 0, ended.stderr
        sizes[len(given) // 2] = int(ended.stderr.split()[0])
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 10


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("missing.png", "no such file"),
        ("http://127.0.0.1/a.png", "http: sources are not fetched"),
        ("file:///etc/passwd", "file: sources are not fetched"),
        (__file__, "no PNG, JPEG, WebP or GIF"),
    ],
)
def test_what_is_no_picture_is_one_line(eyed, source, told):
    ended = run(eyed, "--image", source)
    assert (ended.exit_code, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: picture 1: ") and told in line


def test_a_video_that_is_none_is_one_line(eyed):
    ended = run(eyed, "--video", str(eyed / "0.png"))
    assert ended.exit_code == 1
    assert len(ended.stderr.splitlines()) == 1


def test_a_checkpoint_for_text_says_so(tiny, eyed):
    command = ["--model", str(tiny), *QUICK, "--image", str(eyed / "0.png")]
    ended = CliRunner().invoke(main, command)
    assert ended.exit_code == 1 and "reads text only" in ended.stderr


def test_a_text_prompt_needs_no_pillow(tiny):
    code = (
        "import sys\nfrom mlx_dgemma.cli.generate import main\n"
        f"try: main(['--model', {str(tiny)!r}, *{QUICK!r}])\n"
        "except SystemExit: pass\n"
        "assert not {'PIL', 'av'} & {name.partition('.')[0] for name in sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
