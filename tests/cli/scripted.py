"""A conversation that says what it is told to, without a model.

`python scripted.py SCRIPT OPTIONS` chats with one; SCRIPT is a name of SCRIPTS.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.diffusion import conversation, generation
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.replies import Answer, Call, Malformed, Thought, reply_message

HOSTILE = (
    "\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x1b[2J\x1b[H\x1b[?25l\x1b[?1049h\x1b[?1000h"
    "\x9b31m\x1b(0\x0e\r\x08\x7f\x00\u202eend"
)
WIDE = "漢字 and 🙂🚀 한국 é " * 12
STEPS = 3  # of each canvas

# what each question is answered with, again and again: canvases of parts
SCRIPTS = {
    "plain": [[Answer("one\ntw")], [Answer("o")]],
    "parts": [
        [Thought("Let me think.\nYes")],
        [Thought("."), Answer("\n\nFirst"), Answer(" line.\n")],
        [Call("look", {"at": "the \x1b[2Jsky"}, "call_0"), Malformed("x{\n", "torn")],
        [Answer("Done.")],
    ],
    "hostile": [
        [Thought(HOSTILE), Answer(HOSTILE + "\n" + HOSTILE)],
        [Call(HOSTILE, {HOSTILE: HOSTILE}, "call_0"), Malformed(HOSTILE, HOSTILE)],
        [Answer(HOSTILE)],
    ],
    "wide": [[Thought(WIDE)], [Answer(WIDE + "\n" + WIDE)]],
    "long": [[Answer(f"canvas {n}\n")] for n in range(10_000)],
    "silent": [[]],
    "held": [[Thought("Hm.")], [Answer("a ")], *[[Answer("b")]] * 10_000],
}


class Letters:
    """A tokenizer whose ids are code points."""

    special_ids = frozenset({0})

    class Pieces:
        def add(self, ids):
            return "".join(map(chr, ids))

        def finish(self):
            return ""

    def detokenizer(self):
        return self.Pieces()


class Scripted:
    """Stands for `Conversation`; remembers how it was made and asked.

    pause   seconds from each step to what comes next; a file tells of long ones
    held    characters that a commit holds back, until the conversation is closed
    """

    script: list = SCRIPTS["plain"]
    reason = "stop"
    pause = 0.0
    held = 0
    made: list = []  # noqa: RUF012 - one of each is made

    def __init__(self, model, tokenizer, *, system=None, thinking=False, **options):
        self.system, self.thinking, self.options = system, thinking, options
        self.messages, self.asked, self.files = [], [], []
        Scripted.made.append(self)

    def ask(self, content, *, seed=None):
        if content == "refuse":
            raise SettingsError("refused\x1b[2J, as was asked for")
        if content == "fail":
            raise RuntimeError("[malloc] no room")
        self.asked.append((content, seed))
        before, parts = self.messages, []
        self.messages = [*before, {"role": "user", "content": read(content)}]
        try:
            yield Prefilled(
                request=0, seed=7 if seed is None else seed, prompt_tokens=5,
                seconds=0.0, reused=3,
            )  # fmt: skip
            for index, canvas in enumerate(self.script):
                for number in range(STEPS):
                    yield step(index, number, shown(canvas))
                    if self.pause > 1:
                        Path("asleep").touch()
                    time.sleep(self.pause)
                final = index + 1 == len(self.script)
                parts += canvas
                yield commit(
                    index,
                    self.reason if final else None,
                    canvas if final else cut(canvas, self.held),
                )
        finally:
            self.messages = [*self.messages, reply_message(parts)] if parts else before

    def instruct(self, system):
        self.system = system

    def think(self, on):
        self.thinking = on

    def rewind(self, turns=1):
        if 2 * turns > len(self.messages):
            raise SettingsError("there are not so many to take back")
        self.messages = self.messages[: -2 * turns]

    def reset(self):
        self.messages = []

    def load(self, path):
        self.files.append(("load", path))

    def save(self, path):
        self.files.append(("save", path))


@dataclass(frozen=True)
class Picture:
    """A picture that was read, as conversations keep them."""

    source: str


def read(content):
    """What is kept of a message's content."""
    if isinstance(content, str):
        return content
    return [p | {"image": Picture(p["image"])} if "image" in p else p for p in content]


def shown(canvas):
    """What a draft of these parts reads like."""
    texts = (getattr(part, "text", getattr(part, "name", "")) for part in canvas)
    return "".join(texts).replace("\n", " ") + " draft"


def cut(canvas, held):
    """The parts but for the last characters of the last one."""
    if not held:
        return canvas
    *others, last = canvas
    return [*others, type(last)(last.text[:-held])]


def step(index, number, text):
    ids = list(map(ord, text))
    return Step(
        request=0,
        canvas_index=index,
        step=number,
        steps=STEPS,
        temperature=1.0,
        draft=mx.array(ids),
        canvas=mx.array(ids),
        accepted=mx.array([i % 3 > 0 for i in range(len(ids))]),
        entropy=mx.zeros(len(ids)),
        mean_entropy=0.25,
        stopped=False,
    )


def commit(index, reason, parts):
    return Commit(
        request=0,
        canvas_index=index,
        tokens=(1,),
        steps=STEPS,
        finish_reason=reason,
        text="NOT TO BE SHOWN",
        parts=tuple(parts),
    )


def install(script: str, pause: float = 0.0, patch=setattr) -> None:
    """Put it in the place of conversations with models."""
    patch(Scripted, "script", SCRIPTS[script])
    patch(Scripted, "pause", pause)
    patch(conversation, "Conversation", Scripted)
    patch(generation, "load", lambda *a, **k: (None, Letters()))


if __name__ == "__main__":
    from mlx_dgemma.cli.chat import main

    install(sys.argv[1], pause=float(sys.argv[2]))
    main([*sys.argv[3:], "--model", "scripted"])
