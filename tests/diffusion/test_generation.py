"""Text around the engine: streaming, stop strings, seeds, counts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest
from tiny import VOCABULARY, write_tiny

from mlx_dgemma import (
    Commit,
    Conversation,
    Engine,
    Settings,
    Step,
    generate,
    load,
    stream_generate,
)
from mlx_dgemma.diffusion import report
from mlx_dgemma.errors import SettingsError

# four canvases of three steps, and never an eos
LONG = {"max_tokens": 64, "steps": 3, "entropy_bound": 8.0, "confidence": 0.0}
LONG |= {"eos": {99}, "seed": 0}


@pytest.fixture(scope="module")
def events(tiny_model) -> list:
    return list(stream_generate(*tiny_model, "ab", **LONG))


def text_of(events) -> str:
    return "".join(event.text for event in events)


def commits_of(events) -> list[Commit]:
    return [event for event in events if isinstance(event, Commit)]


def test_stream_and_generate_give_the_same_text(tiny_model, events, capsys):
    text = text_of(events)
    assert generate(*tiny_model, "ab", **LONG) == text
    assert generate(*tiny_model, "ab", verbose=True, **LONG) == text
    head, printed, counts = capsys.readouterr().out.split("==========")
    assert (head, printed) == ("", f"\n{text}\n")
    names = [line.partition(":")[0] for line in counts.strip().split("\n")]
    assert names == ["Prompt", "Generation", "Denoising", "Peak memory"]
    assert (events[0].reused, events[0].encoded) == (0, 6)
    assert [c.finish_reason for c in commits_of(events)] == [None] * 3 + ["length"]
    assert all(e.text == "" for e in events if not isinstance(e, Commit))


def test_keywords_win_over_settings_and_those_over_the_checkpoint(tiny_model):
    settings = Settings(canvas_length=16, steps=2, max_tokens=32, eos=frozenset({99}))
    changes = {"settings": settings, "steps": 3, "max_tokens": None}
    events = list(stream_generate(*tiny_model, "ab", **changes))
    steps = [e for e in events if isinstance(e, Step)]
    assert {(s.steps, len(s.draft)) for s in steps} == {(3, 16)}
    assert sum(len(c.tokens) for c in commits_of(events)) == 32


def test_seed_is_chosen_and_reported(tiny_model):
    options = LONG | {"seed": None}
    first, other = (list(stream_generate(*tiny_model, "ab", **options)) for _ in "ab")
    again = generate(*tiny_model, "ab", **LONG | {"seed": first[0].seed})
    assert again == text_of(first) != text_of(other)


def test_impossible_settings_are_refused_before_the_first_event(tiny_model):
    for changes, message in (
        ({"temperature": 1.0}, "'temperature' is no setting"),
        ({"stop": [""]}, "must be strings"),
        ({"stop": 5}, "stop is 5"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"seed": True}, "seed is True"),
        ({"pinned": {0: 99}}, r"pinned\[0\] is 99"),
    ):
        with pytest.raises(SettingsError, match=message):
            stream_generate(*tiny_model, "ab", **changes)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(tmp_path):
    loaded = load(write_tiny(tmp_path / "m", max_position_embeddings=60))
    options = {"max_tokens": 16, "steps": 1}
    settings = loaded[0].settings.replace(**options)
    for refused in (
        lambda: stream_generate(*loaded, [7] * 45, **options),
        lambda: Engine(loaded[0]).admit([7] * 45, settings, 0),
        lambda: Conversation(*loaded, **options).ask("1" * 41),
    ):
        why = "prompt has 45 tokens and max_tokens is 16; together at most 60 fit"
        with pytest.raises(SettingsError, match=why):
            refused()
    assert list(stream_generate(*loaded, [7] * 44, **options))


def test_earliest_stop_string_ends_text_and_tokens(tiny_model, events):
    """Also across two canvases: then the first one's tokens are out already."""
    text, end = text_of(events), len(commits_of(events)[0].text)
    stops = [[text[at : at + n]] for at in (0, end - 2, end + 1) for n in (1, 4)]
    for stop in [*stops, [text[20:23], text[9:12], "never"]]:
        found = list(stream_generate(*tiny_model, "ab", stop=stop, **LONG))
        expected = text[: min(text.find(s) % 1000 for s in stop)]
        assert (text_of(found), found[-1].finish_reason) == (expected, "stop")
        tokens = [t for commit in commits_of(found) for t in commit.tokens]
        held = "".join(commit.pending_text for commit in commits_of(found))
        assert tiny_model[1].decode(tokens) == expected + held


def test_beginning_of_a_stop_string_is_held_back(tiny_model, events):
    """At the end of a canvas, until the next one decides; at the last, it is text."""
    first, *_, last = [commit.text for commit in commits_of(events)]
    for text, held in ((first, first[-2:]), (last, "")):
        stop = text[-2:] + "never"
        found = commits_of(stream_generate(*tiny_model, "ab", stop=stop, **LONG))
        assert text_of(found) == text_of(events)
        assert found[0].pending_text == held


def test_special_tokens_are_hidden_from_text(tiny_model):
    options = LONG | {"pinned": {0: 3, 1: 10, 2: 2, 3: 11, 4: 1}, "eos": {1}}
    assert generate(*tiny_model, "ab", **options) == VOCABULARY[10] + VOCABULARY[11]


def test_model_and_events_may_move_between_threads(tiny, tiny_model):
    """Unevaluated arrays would belong to the thread that made them."""
    options = LONG | {"pinned": {3: 9}}

    def in_new_thread(function, *args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    model, tokenizer = in_new_thread(load, tiny)
    stream, events = stream_generate(model, tokenizer, "ab", **options), []
    while not events or events[-1] is not None:
        events.append(in_new_thread(next, stream, None))
    assert text_of(events[:-1]) == generate(*tiny_model, "ab", **options)
    steps = [e for e in events if isinstance(e, Step) and e.canvas_index == 0]
    assert all(e.accepted[3].item() and e.entropy[3].item() == 0 for e in steps)


def test_report_counts_finished_and_unfinished_canvases(
    tiny_model, events, monkeypatch
):
    """Of requests that began two seconds ago, half a second of it to encode."""
    monkeypatch.setattr(report.time, "perf_counter", lambda: 102.0)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 52_345_000_000)
    short = list(stream_generate(*tiny_model, "ab", canvas_length=7, **LONG))
    for found, line in (
        (events, "64 committed tokens · 4 canvases (3 + 3 + 3 + 3 steps) · 5.33"),
        (events[:6], "16 committed tokens · 1 canvas (3 steps) and 1 step of one not"),
        (events[:3], "0 committed tokens · 0 canvases and 2 steps of one not"),
        (short, "64 committed tokens · 10 canvases (30 steps) · 2.13 tokens per"),
    ):
        made = report.Report(started=100.0)
        for event in [replace(found[0], seconds=0.5), *found[1:]]:
            made.add(event)
        assert made.line().startswith(f"6 prompt tokens · {line}")
    assert made.line().endswith(" · 32.0 tok/s wall · peak memory 52.34 GB · seed 0")
    assert (made.summary(), made.finish_reason) == (
        "Prompt: 6 tokens, 12.000 tokens-per-sec\n"
        "Generation: 64 tokens, 42.667 tokens-per-sec\n"
        "Denoising: 30 steps, 2.133 tokens-per-forward\nPeak memory: 52.345 GB",
        "length",
    )
