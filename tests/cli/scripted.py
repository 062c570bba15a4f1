"""A conversation that says what a script says, without a model.

`python scripted.py SCRIPT PAUSE OPTIONS` chats with one; SCRIPT is a name of SCRIPTS.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_dgemma import loading
from mlx_dgemma.diffusion import conversation
from mlx_dgemma.diffusion.events import Commit, Prefilled, Step
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.replies import Answer, Call, Malformed, Thought, reply_message

HOSTILE = (
    "\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x1b[2J\x1b[H\x1b[?25l\x1b[?1049h\x1b[?1000h"
    "\x9b31m\x1b(0\x0e\r\x08\x7f\x00\u202e\u2028end"
)
STEPS = 3  # of each canvas

# the answer to every question: canvases of parts
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
    "long": [[Answer(f"canvas {n}\n")] for n in range(10_000)],
    "silent": [[]],
    "held": [[Thought("Hm.")], [Answer("a ")], *[[Answer("b")]] * 10_000],
}


class Words:
    """A tokenizer whose vocabulary is a list; id 0 is special, "½" half a character.

    Without words, ids are code points.
    """

    special_ids = frozenset({0})

    def __init__(self, *words):
        self.words = ["<eos>", *words]
        self.held = ""

    def detokenizer(self):
        return Words(*self.words[1:])

    def add(self, ids):
        words = self.words[1:] and self.words
        text = self.held + "".join(words[i] if words else chr(i) for i in ids)
        self.held = "½" * text.endswith("½")
        return text.removesuffix("½")

    def finish(self):
        return self.held


class ScriptedConversation:
    """Stands for `Conversation`; remembers how it was made and asked.

    pause   seconds of each step; the file `asleep` appears before a long one
    held    characters that a commit holds back, until the conversation is closed
    """

    script, reason, pause, held = SCRIPTS["plain"], "stop", 0.0, 0
    last: "ScriptedConversation"

    def __init__(self, model, tokenizer, *, system=None, thinking=False, **options):
        self.tokenizer, self.options = tokenizer, options
        self.system, self.thinking = system, thinking
        self.messages, self.asked = [], []
        ScriptedConversation.last = self

    def ask(self, content, *, images=(), seed=None, prompt_progress_callback=None):
        if content == "refuse":
            raise SettingsError("refused\x1b[2J, as was asked for")
        if content == "fail":
            raise RuntimeError("[malloc] no room")
        self.asked.append((content, [*images], seed))
        before, parts = self.messages, []
        self.messages = [*before, {"role": "user", "content": content}]
        try:
            self.stats = Prefilled(
                request=0, seed=seed or 7, prompt_tokens=5, seconds=0.0, reused=3
            )
            yield self.stats
            for index, canvas in enumerate(self.script):
                texts = (part.text for part in canvas if not isinstance(part, Call))
                draft = [*map(ord, f"{' '.join(texts)} draft".replace("\n", " "))]
                for number in range(STEPS):
                    yield step(draft, range(0, 999, 2), number=number + 1)
                    if self.pause > 1:
                        Path("asleep").touch()
                    time.sleep(self.pause)
                parts += canvas
                final = index + 1 == len(self.script)
                if self.held and not final:
                    canvas = [replace(canvas[0], text=canvas[0].text[: -self.held])]
                yield Commit(
                    request=0,
                    canvas_index=index,
                    tokens=(1,),
                    steps=STEPS,
                    finish_reason=self.reason if final else None,
                    text="NOT TO BE SHOWN",
                    parts=tuple(canvas),
                )
        finally:
            self.messages = [*self.messages, reply_message(parts)] if parts else before

    def transcript(self):
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def rewind(self, turns=1):
        if 2 * turns > len(self.messages):
            raise SettingsError("there are not so many to take back")
        self.messages = self.messages[: -2 * turns]

    def reset(self):
        self.messages = []


def step(draft, accepted=(), *, number=3, steps=STEPS, entropy=0.25, stopped=False):
    ids = list(draft)
    return Step(
        request=0,
        canvas_index=0,
        step=number - 1,
        steps=steps,
        temperature=1.0,
        draft=mx.array(ids),
        canvas=mx.array(ids),
        accepted=mx.array([i in accepted for i in range(len(ids))]),
        entropy=mx.zeros(len(ids)),
        mean_entropy=entropy,
        stopped=stopped,
    )


def install(script: str, patch=setattr, **changes) -> None:
    """Put it in the place of conversations with models."""
    for name, value in {"script": SCRIPTS[script], **changes}.items():
        patch(ScriptedConversation, name, value)
    patch(conversation, "Conversation", ScriptedConversation)
    patch(loading, "load", lambda *a, **k: (None, Words()))


if __name__ == "__main__":
    from mlx_dgemma.cli.chat import main

    install(sys.argv[1], pause=float(sys.argv[2]), held=int(sys.argv[1] == "held"))
    main([*sys.argv[3:], "--model", "sudoku4"])
