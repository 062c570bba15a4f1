"""What a person sees of a denoising step, on any width and whatever the model says."""

import io
import sys
import unicodedata
import warnings

import pytest
from rich.console import Console
from scripted import HOSTILE, Words, step
from terminal import CODES, Screen

from mlx_dgemma.cli import render
from mlx_dgemma.cli.common import one_line_errors, printable
from mlx_dgemma.cli.render import AnswerView

WIDE = ["漢字", "日本語", "🙂", "🚀🚀", "한국", "e\u0301", "word ", "a", " ", "\n"]


class Terminal(io.TextIOWrapper):
    """A stream that is a terminal."""

    columns, rows = 80, 24

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", write_through=True)

    def isatty(self):
        return True

    def fileno(self):
        return 99

    def take(self):
        """What was sent since the last time."""
        sent = self.buffer.getvalue().decode()
        self.buffer.seek(0)
        self.buffer.truncate()
        return sent


def terminal_stderr(monkeypatch, *, stdout=False):
    """Make stderr a terminal. Not a fixture: pytest would set its own stderr after."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if stdout:
        monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    size = lambda handle: (terminal.columns, terminal.rows)  # noqa: E731
    monkeypatch.setattr(render.os, "get_terminal_size", size)
    monkeypatch.setattr(render, "SECONDS_PER_FRAME", 0)
    return terminal


def draw(monkeypatch, words, draft, columns=80, rows=24, before=""):
    """A frame: (what is sent, its lines without codes)."""
    stderr = terminal_stderr(monkeypatch)
    stderr.columns, stderr.rows = columns, rows
    with AnswerView(words, True) as view:
        view.write(before)
        view.show(step(draft, {2, 3}))
        sent = stderr.take()
    return sent, CODES.sub("", sent).removeprefix("\r").split("\n")


@pytest.mark.parametrize("columns", [80, 40, 10])
def test_frame_fits_the_terminal_and_holds_the_whole_draft(monkeypatch, columns):
    words = Words(*WIDE)
    draft = [i % len(WIDE) + 1 for i in range(0, 3 * 256, 3)]
    before = "漢字 and more " * 9
    _, lines = draw(monkeypatch, words, draft, columns, rows=1000, before=before)
    widths = [Screen(10_000).feed(line).cursor[1] for line in lines]
    # one column is left free, two where a wide character does not fit
    assert columns - 2 <= max(widths) < columns
    wanted = before + "".join(words.words[i] for i in draft)
    assert "".join("".join(lines[:-1]).split()) == "".join(wanted.split())


@pytest.mark.parametrize(
    ("columns", "rows"), [(80, 24), (10, 24), (80, 3), (3, 2), (1, 24)]
)
def test_canvas_too_tall_shows_its_end_and_its_numbers(monkeypatch, columns, rows):
    words = Words(*[f"{i}\n" for i in range(99)], "last")
    _, lines = draw(monkeypatch, words, range(1, 101), columns, rows)
    assert len(lines) <= max(2, rows - 1)
    assert lines[0] == "…"
    assert lines[-1] == "step 3/3"[: max(2, columns - 1)] or columns > 10
    if rows == 24:
        assert "last".endswith(lines[-2])


@pytest.mark.parametrize("columns", [80, 10])
def test_control_codes_of_the_model_are_not_sent(monkeypatch, columns):
    words = Words(*HOSTILE, HOSTILE, "plain")
    draft = range(1, len(words.words))
    sent, lines = draw(monkeypatch, words, draft, columns, before=HOSTILE)
    assert "\x1b[1m" in sent, "colours of our own are sent"
    text = "".join(lines)
    assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl")}
    assert "␛" in text and "␇" in text


def test_printable_replaces_all_controls_but_newlines():
    text = "".join(map(chr, [*range(0x20000), *range(0xE0000, 0xE1000)]))
    safe = printable(text)
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    left = {c for c in safe if unicodedata.category(c) in kinds}
    assert left == {"\n", "\u200c", "\u200d"}  # letters and emoji need the joiners
    assert safe.count("\n") == 1
    assert printable("a\x1b[31m\r\x00\x7f\x9b\u202e\ud800") == (
        "a␛[31m␍␀␡<U+009B><U+202E><U+D800>"
    )
    kept = "ж漢🙂 👩\u200d👧 e\u0301\n"
    assert printable(kept) == kept


def test_accepted_tokens_are_bold_drafts_dim_and_special_ones_dots():
    def text_and_looks(words, draft, accepted, before=""):
        text = render.canvas_text(words, step(draft, accepted), before)
        looks = (text.get_style_at_offset(Console(), i) for i in range(len(text)))
        return text.plain, "".join("b" if s.bold else "d" * s.dim for s in looks)

    words = Words("aa", "bb", "½")
    assert text_and_looks(words, [1, 2, 1], {0, 2}, "said ") == (
        "said aabbaa", "bbbbbbbddbb"
    )  # fmt: skip
    assert text_and_looks(words, [1, 3], {0, 1}) == ("aa½", "bbd")
    assert text_and_looks(words, [1, 0, 0, 2, 0, 0], ())[0] == "aa··bb"
    assert text_and_looks(words, [0, 0, 0], ()) == ("", "")


def test_numbers_count_the_canvas_and_fit_the_width():
    one = step([1, 1, 0, 0], {0, 2, 3}, number=12, steps=48, entropy=1.23456)
    line = "step 12/48 · entropy 1.235 nats · 3/4 accepted"
    fitting = {46: line, 45: line[:31], 30: line[:10], 6: "step 1"}
    for width, expected in fitting.items():
        assert render.numbers(one, width) == expected


def test_shorter_frame_leaves_nothing_of_a_longer_one(monkeypatch):
    stderr = terminal_stderr(monkeypatch)
    screen = Screen().feed("above\n")
    words = Words("one two\nthree four\nfive\nsix", "1 漢字\nb", "x\ny\nz")
    with AnswerView(words, True) as view:
        view.status("encoding …")
        for token in (1, 2, 3):
            view.show(step([token]))
            shown = screen.feed(stderr.take()).lines()
            assert shown[:-1] == ["above", *words.words[token].split("\n")]
    # tmux moves what a clear from the top would erase into its history
    before, clear, after = stderr.take().partition(render.ERASE_BELOW)
    assert clear and screen.feed(before).lines() == ["above"]
    assert screen.feed(clear + after).lines() == ["above"]
    assert screen.cursor == (1, 0)


def test_characters_wider_than_expected_do_not_break_a_line(monkeypatch):
    stderr = terminal_stderr(monkeypatch)
    with AnswerView(Words("漢" * 100), True) as view:
        view.show(step([1]))
        screen = Screen(columns=60).feed(stderr.take())  # each as if a quarter wider
        assert len(screen.lines()) == 4
        assert screen.feed("x" * 61).cursor[0] == 4, "wrapping is on again"


def test_at_most_twenty_frames_a_second(monkeypatch):
    stderr = terminal_stderr(monkeypatch)
    monkeypatch.setattr(render, "SECONDS_PER_FRAME", 1 / 20)
    clock = iter(i * 0.01 for i in range(1, 10_000))  # steps of 10 ms
    monkeypatch.setattr(render.time, "monotonic", lambda: next(clock))
    with AnswerView(Words("a"), True) as view:
        for number in range(200):  # two seconds, a canvas done every third step
            view.show(step([1], number=number + 1, steps=200, stopped=number % 3 == 2))
            if number % 3 == 2:
                view.write("a\n")
    assert 30 <= stderr.take().count(render.WRAP_OFF) <= 41


def test_live_view_writes_the_same_text_as_none(monkeypatch, capfdbinary):
    def show_canvases(show):
        with AnswerView(Words("x"), show) as view:
            for text in ["ab", "c\nde", "", "\n\nf", "\x1bg"]:
                view.show(step([1]))
                view.write(text)

    stderr = terminal_stderr(monkeypatch)
    for show in (True, False):
        show_canvases(show)
        assert capfdbinary.readouterr().out == b"abc\nde\n\nf\x1bg\n"
    assert stderr.take().count(render.WRAP_OFF) == 5
    monkeypatch.setattr(sys, "stdout", stderr)
    for show in (True, False):
        show_canvases(show)
        assert Screen().feed(stderr.take()).lines() == ["abc", "de", "", "f␛g"]
    monkeypatch.setenv("TERM", "dumb")
    show_canvases(True)
    assert stderr.take() == "abc\nde\n\nf␛g\n"


def test_long_answer_shows_its_steps_without_a_canvas_too(monkeypatch):
    terminal, screen = terminal_stderr(monkeypatch, stdout=True), Screen()
    with AnswerView(Words(" draft"), False) as view:
        view.show(step([1]))
        assert terminal.take() == "", "an answer of less than a second draws nothing"
        monkeypatch.setattr(render, "SECONDS_PER_STATUS", 0)
        view.show(step([1], number=2))
        (line,) = screen.feed(terminal.take()).lines()
        assert line.startswith("step 2/3")
        view.write("one\ntwo")
        assert screen.feed(terminal.take()).lines() == ["one", "two"]
        view.show(step([1]))
        assert terminal.take() == "", "beside a line that is not ended"
        view.write("\n")
        view.show(step([1]))
    assert screen.feed(terminal.take()).lines() == ["one", "two"]


def test_committed_lines_stay_above_the_canvas_and_an_open_line_begins_it(monkeypatch):
    terminal, screen = terminal_stderr(monkeypatch, stdout=True), Screen()
    with AnswerView(Words(" draft"), True) as view:
        view.show(step([1]))
        view.write("one\ntwo\nthree")
        assert screen.feed(terminal.take()).lines()[0] == " draft"
        view.show(step([1], number=1))
        shown = screen.feed(terminal.take()).lines()
        assert shown[:3] == ["one", "two", "three draft"]
        assert shown[3].startswith("step 1/3") and len(shown) == 4


def test_warning_is_one_line_above_the_canvas_once(monkeypatch):
    stderr, screen = terminal_stderr(monkeypatch), Screen()
    with one_line_errors(False), AnswerView(Words("a\nb"), True) as view:
        warnings.simplefilter("always")
        for _ in range(2):
            view.show(step([1]))
            warnings.warn("mind\nthe \x1b[2Jgap", stacklevel=1)
        view.show(step([1]))
        shown = screen.feed(stderr.take()).lines()
        assert shown[:3] == ["warning: mind the ␛[2Jgap", "a", "b"]
        assert shown[3].startswith("step") and len(shown) == 4
