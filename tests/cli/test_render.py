"""What a person sees of a denoising step, on any width and whatever the model says."""

import io
import sys
import unicodedata

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from terminal import COLOURS, Screen

from mlx_dgemma.cli import render
from mlx_dgemma.cli.common import harmless
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\x00\u202e\u2028\x85"
WIDE = ["漢字", "日本語", "🙂", "🚀🚀", "한국", "e\u0301", "word ", "a", " ", "\n"]


class Pieces:
    """Hands out each piece as it comes; "½" is held back, as half a character is."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.held = ""

    def add(self, ids):
        text = self.held + "".join(self.pieces[i] for i in ids)
        self.held = "½" * text.endswith("½")
        return text.removesuffix("½")

    def finish(self):
        return self.held


class Words:
    """A tokenizer whose vocabulary is a list; id 0 is special."""

    special_ids = frozenset({0})

    def __init__(self, *pieces):
        self.pieces = ["<eos>", *pieces]

    def detokenizer(self):
        return Pieces(self.pieces)


def step(draft, accepted=(), *, number=3, steps=48, entropy=0.25, stopped=False):
    draft = list(draft)
    row = mx.array([i in accepted for i in range(len(draft))])
    return Step(
        request=0,
        canvas_index=0,
        step=number - 1,
        steps=steps,
        temperature=1.0,
        draft=mx.array(draft),
        canvas=mx.array(draft),
        accepted=row,
        entropy=mx.zeros(len(draft)),
        mean_entropy=entropy,
        stopped=stopped,
    )


def commit(text, reason=None):
    return Commit(
        request=0, canvas_index=0, tokens=(1,), steps=1, finish_reason=reason, text=text
    )


def console(columns=80):
    return Console(file=io.StringIO(), width=columns, force_terminal=True)


def lines_of(words, one, columns, rows=1000, before=""):
    """A frame as it is sent: (its lines with colour codes, the same without)."""
    out = console(columns)
    for line in render.frame(out, words, one, before, columns, rows):
        out.print(line, soft_wrap=True)
    sent = out.file.getvalue()
    return sent.splitlines(), COLOURS.sub("", sent).split("\n")[:-1]


class Terminal(io.StringIO):
    """A stream a person watches; bytes may be written to its `buffer`."""

    columns = 80

    def __init__(self):
        super().__init__()
        self.buffer = self.Bytes()
        self.buffer.text = self

    class Bytes(io.BytesIO):
        def write(self, data):
            return self.text.write(data.decode())

    def isatty(self):
        return True

    def fileno(self):
        return 99

    def take(self):
        """What was sent since the last time."""
        sent = self.getvalue()
        self.seek(0)
        self.truncate()
        return sent


def watched(monkeypatch):
    """Make stderr a terminal. Not a fixture: pytest would set its own stderr after."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    size = lambda handle: (terminal.columns, 24)  # noqa: E731
    monkeypatch.setattr(render.os, "get_terminal_size", size)
    return terminal


@pytest.mark.parametrize("columns", [80, 40, 10])
def test_no_line_is_as_wide_as_the_terminal(columns):
    words = Words(*WIDE)
    draft = [i % len(WIDE) + 1 for i in range(0, 3 * 256, 3)]
    _, lines = lines_of(words, step(draft), columns, before="漢字 and more " * 9)
    widths = [Screen(10_000).feed(line).column for line in lines]
    assert max(widths) < columns
    assert max(widths) >= columns - 2  # and the room there is is used


@pytest.mark.parametrize("columns", [80, 40, 10])
def test_a_frame_holds_the_whole_draft(columns):
    words = Words(*WIDE)
    draft = [i % len(WIDE) + 1 for i in range(0, 3 * 64, 3)]
    _, lines = lines_of(words, step(draft), columns)
    wanted = "".join(words.pieces[i] for i in draft)
    assert "".join("".join(lines[:-1]).split()) == "".join(wanted.split())


@pytest.mark.parametrize("columns", [80, 40, 10, 3, 1])
@pytest.mark.parametrize("rows", [24, 3, 2])
def test_a_canvas_too_tall_shows_its_end_and_its_numbers(columns, rows):
    words = Words(*[f"{i}\n" for i in range(99)], "last")
    _, lines = lines_of(words, step(range(1, 101)), columns, rows)
    assert len(lines) <= max(2, rows - 1)
    assert lines[0] == "…"
    assert lines[-1] == "step 3/48"[: max(2, columns - 1)] or columns > 10
    if rows == 24:
        assert "last".endswith(lines[-2])


@pytest.mark.parametrize("columns", [80, 40, 10])
def test_no_control_code_of_the_model_is_sent(columns):
    words = Words(*HOSTILE, HOSTILE, "plain")
    draft = range(1, len(words.pieces))
    coloured, lines = lines_of(words, step(draft, {2, 3}), columns, before=HOSTILE)
    assert any("\x1b[" in line for line in coloured), "colours of our own are sent"
    controls = {c for c in "".join(lines) if unicodedata.category(c) in ("Cc", "Cf")}
    assert not controls
    assert "␛" in "".join(lines) and "␇" in "".join(lines)
    assert "\u2028" not in "".join(lines)


@given(st.text(st.characters(codec="utf-8") | st.sampled_from(HOSTILE), max_size=40))
@settings(max_examples=200, deadline=None)
def test_harmless_leaves_newlines_as_the_only_control(text):
    safe = harmless(text)
    left = {c for c in safe if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left <= {"\n"}
    assert not {"\u202e", "\u2066", "\u200f", "\ufeff"} & set(safe)
    assert safe.count("\n") == text.count("\n")


def test_harmless_shows_what_it_replaces_and_keeps_the_rest():
    assert harmless("a\x1b[31m\r\x00\x7f\x9b\u202e\ud800") == (
        "a␛[31m␍␀␡<U+009B><U+202E><U+D800>"
    )
    kept = "ж漢🙂 👩\u200d👧 e\u0301\n"
    assert harmless(kept) == kept


def test_accepted_tokens_are_bold_and_drafts_dim():
    words = Words("aa", "bb", "cc")
    text = render.canvas_text(words, step([1, 2, 3], {0, 2}), before="told ")
    looks = [text.get_style_at_offset(console(), i) for i in range(len(text))]
    assert text.plain == "told aabbcc"
    assert [(s.bold, s.dim) for s in looks] == (
        [(True, None)] * 5
        + [(True, None)] * 2
        + [(None, True)] * 2
        + [(True, None)] * 2
    )


def test_special_tokens_are_dots_and_those_at_the_end_are_left_out():
    words = Words("a", "b")
    text = render.canvas_text(words, step([1, 0, 0, 2, 0, 0, 0]))
    assert text.plain == "a··b"
    assert render.canvas_text(words, step([0, 0, 0])).plain == ""


def test_half_a_character_at_the_end_is_shown_as_a_draft():
    text = render.canvas_text(Words("a", "½"), step([1, 2], {0, 1}))
    assert text.plain == "a½"
    assert text.get_style_at_offset(console(), 1).dim


def test_the_numbers_count_the_whole_canvas():
    one = step([1, 1, 0, 0], {0, 2, 3}, number=12, entropy=1.23456)
    assert render.numbers(one, 80) == "step 12/48 · entropy 1.235 nats · 3/4 accepted"


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (46, "step 12/48 · entropy 1.235 nats · 3/4 accepted"),
        (45, "step 12/48 · entropy 1.235 nats"),
        (30, "step 12/48"),
        (6, "step 1"),
    ],
)
def test_numbers_that_do_not_fit_are_left_out(width, line):
    one = step([1, 1, 0, 0], {0, 2, 3}, number=12, entropy=1.23456)
    assert render.numbers(one, width) == line


def draw(surface, text, columns=80):
    words = Words(text)
    surface.draw(render.frame(surface.console, words, step([1]), "", columns, 99))


def test_a_shorter_frame_leaves_nothing_of_a_longer_one(monkeypatch):
    drawn = watched(monkeypatch)
    screen = Screen().feed("above\n")
    surface = render.Surface()
    for text in ("one two\nthree four\nfive\nsix", "1 漢字\nb", "x\ny\nz"):
        draw(surface, text)
        shown = screen.feed(drawn.take()).lines()
        assert shown[:-1] == ["above", *text.split("\n")]
    surface.erase()
    assert screen.feed(drawn.take()).lines() == ["above"]
    assert (screen.row, screen.column) == (1, 0)


def test_a_terminal_made_narrower_shows_one_frame_only(monkeypatch):
    drawn = watched(monkeypatch)
    screen = Screen(80).feed("above\n")
    surface = render.Surface()
    for columns in (80, 40, 17):
        screen.narrow(columns)
        drawn.columns = columns
        draw(surface, "word " * 20, columns)
        shown = screen.feed(drawn.take()).lines()
        assert shown[0] == "above"
        assert " ".join(shown[1:-1]).split() == ["word"] * 20
        assert shown[-1].startswith("step 3/48")
    screen.narrow(9)
    drawn.columns = 9
    surface.erase()
    assert screen.feed(drawn.take()).lines() == ["above"]


def test_characters_wider_than_thought_do_not_break_a_line(monkeypatch):
    drawn = watched(monkeypatch)
    surface = render.Surface()
    draw(surface, "漢" * 100)
    screen = Screen(columns=60).feed(drawn.take())  # as if each took a quarter more
    assert len(screen.lines()) == 4
    assert screen.feed("x" * 61).row == 4, "wrapping is on again"


def test_the_screen_is_never_cleared_from_its_top(monkeypatch):
    """tmux moves what such a clear would erase into its history."""
    drawn = watched(monkeypatch)
    surface = render.Surface()
    draw(surface, "a\nb")
    screen = Screen().feed(drawn.take())
    surface.erase()
    before, clear, _ = drawn.take().partition(render.ERASE_BELOW)
    assert clear and screen.feed(before).lines() == []
    assert screen.row == 2


def test_at_most_twenty_frames_a_second(monkeypatch):
    drawn = watched(monkeypatch)
    clock = iter(i * 0.01 for i in range(1, 10_000))  # steps of 10 ms
    monkeypatch.setattr(render.time, "monotonic", lambda: next(clock))
    with render.screen(Words("a"), True) as view:
        for number in range(200):  # two seconds, a canvas done every third step
            done = number % 3 == 2
            view.show(step([1], number=number + 1, steps=200, stopped=done))
            if done:
                view.show(commit("a\n"))
    frames = drawn.getvalue().count(render.WRAP_OFF)
    assert 30 <= frames <= 41


def test_the_live_view_writes_the_same_bytes_as_none(monkeypatch, capfdbinary):
    drawn = watched(monkeypatch)
    written = [written_by(show, monkeypatch, capfdbinary) for show in (True, False)]
    assert written == [b"abc\nde\n\nf\x1bg\n"] * 2
    assert drawn.getvalue().count(render.WRAP_OFF) == 5


def test_the_live_view_leaves_the_text_alone_on_a_terminal(monkeypatch):
    drawn = watched(monkeypatch)
    monkeypatch.setattr(sys, "stdout", drawn)
    written_by(True, monkeypatch)
    live = Screen().feed(drawn.take()).lines()
    written_by(False, monkeypatch)
    assert live == Screen().feed(drawn.take()).lines() == ["abc", "de", "", "f␛g"]


def written_by(show, monkeypatch, capture=None):
    """Bytes on stdout of some canvases whose lines end at odd image_spans."""
    monkeypatch.setattr(render, "SECONDS_PER_FRAME", 0)
    with render.screen(Words("x"), show) as view:
        view.show(Prefilled(request=0, seed=1, prompt_tokens=1, seconds=0.0))
        for text in ["ab", "c\nde", "", "\n\nf", "\x1bg"]:
            view.show(step([1]))
            view.show(commit(text))
    return capture.readouterr().out if capture else b""


def test_committed_lines_stay_above_the_canvas_and_an_open_line_begins_it(monkeypatch):
    drawn = watched(monkeypatch)
    monkeypatch.setattr(render, "SECONDS_PER_FRAME", 0)
    monkeypatch.setattr(sys, "stdout", drawn)
    with render.screen(Words(" draft"), True) as view:
        view.show(step([1]))
        view.show(commit("one\ntwo\nthree"))
        assert Screen().feed(drawn.getvalue()).lines()[0] == " draft"
        view.show(step([1], number=1))
        shown = Screen().feed(drawn.getvalue()).lines()
        assert shown[:3] == ["one", "two", "three draft"]
        assert shown[3].startswith("step 1/48") and len(shown) == 4


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [(True, "a␛[2J漢\n"), (False, "a\x1b[2J漢\n")],
)
def test_text_is_made_harmless_for_a_terminal_alone(
    capfdbinary, monkeypatch, terminal, expected
):
    monkeypatch.setattr(render, "is_terminal", lambda stream: terminal)
    with render.screen(Words("a"), False) as view:
        view.show(commit("a\x1b[2J漢"))
    assert capfdbinary.readouterr().out == expected.encode()


def test_a_dumb_terminal_gets_plain_text(monkeypatch, capsysbinary):
    drawn = watched(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with render.screen(Words("a"), True) as view:
        view.show(step([1]))
        view.show(commit("text"))
    assert drawn.getvalue() == ""
    assert capsysbinary.readouterr().out == b"text\n"
