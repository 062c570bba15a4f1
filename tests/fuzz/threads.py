"""Threads on one model, one conversation asked twice at once, and cancelled answers.

    python tests/fuzz/threads.py [--rounds 100] [--texts 96] [--cancelled 500]

One conversation asked from two threads: each round must give one answer and one
refusal, or two answers one after the other. Texts from 8 threads that share a model
must be those of one thread. Memory must not grow while answers are cancelled at any
step. Uses the built-in `sudoku4`; exits with 1 if anything else was found.
"""

import argparse
import gc
import random
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from mlx_dgemma import Conversation, generate, load, stream_generate
from mlx_dgemma.errors import SettingsError

GROWTH = 2**20  # bytes of MLX; of the process 32 times that
SHORT = {"max_tokens": 64, "steps": 8}


def asked_twice(model, tokenizer, rounds: int) -> int:
    """Ask one conversation from two threads at once; return the rounds that failed."""
    failed = 0
    for number in range(rounds):
        talk = Conversation(model, tokenizer, **SHORT)

        def ask(text: str, talk=talk, seed=number) -> str:
            try:
                return "".join(event.text for event in talk.ask(text, seed=seed))
            except SettingsError as error:
                return f"refused: {error}"

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(ask, ["12_4", "4_21"]))
        turns = len(talk.messages)
        refused = sum(answer.startswith("refused: ") for answer in answers)
        failed += turns != 2 * (2 - refused) or refused == 2
    return failed


def shared(model, tokenizer, count: int) -> int:
    """Return how many texts of 8 threads differ from those of one."""
    prompts = [f"{number % 4 + 1}_{number % 3 + 1}4" for number in range(count)]

    def answer(number: int) -> str:
        return generate(model, tokenizer, prompts[number], seed=number, **SHORT)

    alone = [answer(number) for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, range(count)))
    return sum(a != b for a, b in zip(alone, together, strict=True))


def cancelled(model, tokenizer, count: int) -> tuple[int, int]:
    """Cancel answers at any event; return how MLX's memory and all memory grew."""
    rng = random.Random(0)

    def some(times: int) -> tuple[int, int]:
        for _ in range(times):
            stream = stream_generate(model, tokenizer, "1_34" * 8, seed=0, **SHORT)
            for _ in range(rng.randint(0, 9)):
                next(stream, None)
            stream.close()
        gc.collect()
        mx.clear_cache()
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return mx.get_active_memory(), usage

    before, after = some(50), some(count)
    return after[0] - before[0], after[1] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--cancelled", type=int, default=500)
    given = parser.parse_args()
    model, tokenizer = load("sudoku4")
    failed = asked_twice(model, tokenizer, given.rounds)
    print(f"one conversation, two threads: {failed} of {given.rounds} rounds failed")
    other = shared(model, tokenizer, given.texts)
    print(f"8 threads, one model: {other} of {given.texts} texts differ")
    grown, process = cancelled(model, tokenizer, given.cancelled)
    print(
        f"{given.cancelled} cancelled: {grown:,} bytes more in MLX, {process:,} in all"
    )
    sys.exit(bool(failed or other or grown > GROWTH or process > 32 * GROWTH))


if __name__ == "__main__":
    main()
