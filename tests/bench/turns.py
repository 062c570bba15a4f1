"""Count what conversations encode per turn, and compare with encoding everything.

    python tests/bench/turns.py [--model sudoku4] [--conversations 20] [--turns 6]

Each turn asks for a puzzle; before some turns a past message is edited or a turn is
taken back. The same messages and seed go through `stream_generate`, which encodes all
of them, and every number of every step must be equal. Prints per turn the mean tokens
of the prompt = tokens reused + tokens encoded, as Markdown; exits with 1 when anything
differs.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "convert"))
from sudoku import held_out  # noqa: E402

from mlx_dgemma import Prefilled, Step, load, stream_generate  # noqa: E402
from mlx_dgemma.diffusion.conversation import Conversation  # noqa: E402


def numbers(events) -> list:
    """Return drafts, canvases, entropies and tokens of all events."""
    return [
        [e.draft.tolist(), e.canvas.tolist(), np.array(e.entropy).tolist()]
        if isinstance(e, Step)
        else [e.tokens, e.text]
        for e in events
        if not isinstance(e, Prefilled)
    ]


def change_the_past(talk: Conversation, chance: random.Random) -> None:
    """Edit a message, take back a turn, or neither."""
    if len(talk.messages) < 4 or chance.random() > 0.4:
        return
    if chance.random() < 0.5:
        return talk.rewind()
    index = chance.randrange(len(talk.messages) - 1)
    talk.edit(index, talk.messages[index]["content"][::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sudoku4")
    parser.add_argument("--conversations", type=int, default=20)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--prefill-step-size", type=int, default=256)
    given = parser.parse_args()
    model, tokenizer = load(given.model)
    chance, whole = random.Random(0), given.conversations * given.turns
    puzzles = [puzzle for puzzle, _ in held_out(whole)]
    totals = np.zeros((given.turns, 3), int)
    seconds, same = np.zeros(2), 0
    for number in range(given.conversations):
        size = {"prefill_step_size": given.prefill_step_size}
        talk = Conversation(model, tokenizer, **size)
        for turn in range(given.turns):
            change_the_past(talk, chance)
            content, seed = puzzles.pop(), 100 * number + turn
            said = [*talk.messages, {"role": "user", "content": content}]
            events = list(talk.ask(content, seed=seed))
            wanted = list(stream_generate(model, tokenizer, said, seed=seed, **size))
            same += numbers(events) == numbers(wanted)
            first, other = events[0], wanted[0]
            assert isinstance(first, Prefilled) and isinstance(other, Prefilled)
            totals[turn] += first.prompt_tokens, first.reused, first.encoded
            seconds += first.seconds, other.seconds
    head = [f"turn {turn + 1}" for turn in range(given.turns)]
    mean = totals / given.conversations
    cells = ["{:.0f} = {:.0f} + {:.0f}".format(*row) for row in mean]
    print("|", " | ".join([*head, "same numbers"]), "|")
    print("|---" * (given.turns + 1) + "|")
    print("|", " | ".join([*cells, f"{same} of {whole}"]), "|")
    prompts, reused, encoded = totals.sum(axis=0)
    print(
        f"\n{prompts} tokens of prompts, {reused} of them reused, {encoded} encoded in "
        f"{seconds[0]:.2f} s; all of them in {seconds[1]:.2f} s."
    )
    sys.exit(same < whole)


if __name__ == "__main__":
    main()
