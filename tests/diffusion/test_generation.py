"""Text around the engine: streaming, stop strings, seeds, counts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import mlx.core as mx
import pytest
from tiny import VOCABULARY, write_tiny

from mlx_dgemma import Commit, Prefilled, Step, generate, load, stream_generate
from mlx_dgemma.diffusion import report
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.report import Report
from mlx_dgemma.diffusion.request import StopFilter
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.settings import Settings
from mlx_dgemma.text.replies import Answer

# without an eos: four canvases
LONG = {"max_tokens": 64, "steps": 3, "entropy_bound": 8.0, "confidence": 2.0}
LONG |= {"eos": {99}, "seed": 0}
SHORT = LONG | {"max_tokens": 16}


@pytest.fixture(scope="module")
def long_text(tiny_model) -> str:
    return generate(*tiny_model, "ab", **LONG)


def text_of(events) -> str:
    return "".join(event.text for event in events)


def test_stream_and_generate_give_the_same_text(tiny_model, long_text):
    events = list(stream_generate(*tiny_model, "ab", **LONG))
    assert text_of(events) == long_text
    assert isinstance(events[0], Prefilled)
    assert (events[0].reused, events[0].encoded) == (0, 6)
    commits = [e for e in events if isinstance(e, Commit)]
    assert len(commits) == 4 and commits[-1] is events[-1]
    assert [c.finish_reason for c in commits] == [None] * 3 + ["length"]
    assert all(e.text == "" for e in events if not isinstance(e, Commit))


def test_keywords_win_over_settings_and_those_over_the_checkpoint(tiny_model):
    model, _ = tiny_model
    settings = Settings(canvas_length=16, steps=2, max_tokens=32, eos=frozenset({99}))
    changes = {"steps": 3, "max_tokens": None}
    events = list(stream_generate(*tiny_model, "ab", settings=settings, **changes))
    steps = [e for e in events if isinstance(e, Step)]
    assert {(s.steps, len(s.draft)) for s in steps} == {(3, 16)}
    assert sum(len(e.tokens) for e in events if isinstance(e, Commit)) == 32
    assert model.settings.steps == 48


def test_verbose_prints_the_text_and_counts(tiny_model, capsys, long_text):
    assert generate(*tiny_model, "ab", verbose=True, **LONG) == long_text
    head, text, counts = capsys.readouterr().out.split("==========")
    assert (head, text) == ("", f"\n{long_text}\n")
    assert [line.partition(":")[0] for line in counts.strip().split("\n")] == (
        ["Prompt", "Generation", "Denoising", "Peak memory"]
    )


def test_seed_is_chosen_and_reported(tiny_model):
    options = {k: v for k, v in SHORT.items() if k != "seed"}
    events = list(stream_generate(*tiny_model, "ab", **options))
    again = generate(*tiny_model, "ab", seed=events[0].seed, **options)
    assert again == text_of(events)
    other = next(iter(stream_generate(*tiny_model, "ab", **options)))
    assert other.seed != events[0].seed


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
    folder = write_tiny(tmp_path / "m", max_position_embeddings=60)
    model, tokenizer = load(folder)
    talk = Conversation(model, tokenizer, max_tokens=16)
    why = r"prompt has 45 tokens and max_tokens is 16; together at most 60 fit"
    for refused in (
        lambda: stream_generate(model, tokenizer, [7] * 45, max_tokens=16),
        lambda: Engine(model).admit([7] * 45, model.settings.replace(max_tokens=16), 0),
    ):
        with pytest.raises(SettingsError, match=why):
            refused()
    with pytest.raises(SettingsError, match="together at most 60 fit this model"):
        talk.ask("1" * 60)
    assert len(talk.prefix) == 0 and talk.messages == []
    assert list(stream_generate(model, tokenizer, [7] * 44, max_tokens=16, steps=1))


def test_earliest_stop_string_ends_text_and_tokens(tiny_model, long_text):
    """Also across two canvases: then the first one's tokens are out already."""
    spans = [(start, start + size) for start in (0, 11, 15) for size in (1, 4)]
    for stops in [[long_text[a:b]] for a, b in spans] + [
        [long_text[20:23], long_text[9:12], "never"]
    ]:
        events = list(stream_generate(*tiny_model, "ab", stop=stops, **LONG))
        expected = long_text[: min(long_text.find(s) % 1000 for s in stops)]
        assert text_of(events) == expected
        assert events[-1].finish_reason == "stop"
        commits = [e for e in events if isinstance(e, Commit)]
        tokens = [t for e in commits for t in e.tokens]
        held = "".join(e.pending_text for e in commits)
        assert tiny_model[1].decode(tokens) == expected + held
    # the end is not held back for a stop string that never comes
    stop = long_text[-1] + "never"
    assert generate(*tiny_model, "ab", stop=stop, **LONG) == long_text


class Echo:
    """A reply parser whose ids are code points."""

    def add(self, tokens):
        return [Answer("".join(map(chr, tokens)))]

    def finish(self):
        return []


def commit(text, reason=None, steps=1):
    tokens = tuple(map(ord, text))
    return Commit(
        request=0, canvas_index=0, tokens=tokens, steps=steps, finish_reason=reason
    )


def test_beginning_of_a_stop_string_is_held_back():
    filter = StopFilter(Echo(), ["END."])
    first = filter.write(commit("one EN"))
    assert (first.text, first.pending_text) == ("one ", "EN")
    assert filter.write(commit("Dless ")).text == "ENDless "
    assert filter.write(commit("E")).text == ""
    last = filter.write(commit("ND. more", "length"))
    assert (last.text, last.finish_reason) == ("", "stop")


def test_special_tokens_are_hidden_from_text(tiny_model):
    options = SHORT | {"pinned": {0: 3, 1: 10, 2: 2, 3: 11, 4: 1}, "eos": {1}}
    assert generate(*tiny_model, "ab", **options) == VOCABULARY[10] + VOCABULARY[11]


def test_model_and_events_may_move_between_threads(tiny, tiny_model):
    """Unevaluated arrays would belong to the thread that made them."""
    options = SHORT | {"max_tokens": 32, "pinned": {3: 9}}

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


# --- report --------------------------------------------------------------------------


def step(number):
    return Step(**dict.fromkeys(f.name for f in fields(Step)) | {"step": number})


PREFILLED = Prefilled(request=0, seed=9, prompt_tokens=6, seconds=0.5)


def report_of(*events) -> Report:
    made = Report(started=100.0)
    for event in events:
        made.add(event)
    return made


def test_report_of_a_finished_request(monkeypatch):
    """That began two seconds ago, with a peak memory of 3 MB."""
    monkeypatch.setattr(report.time, "perf_counter", lambda: 102.0)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 3_000_000)
    first, last = commit("a" * 16, steps=2), commit("abcd", "stop")
    made = report_of(PREFILLED, step(0), step(1), first, step(0), last)
    assert made.line() == (
        "6 prompt tokens · 20 committed tokens · 2 canvases (2 + 1 steps) · "
        "6.67 tokens per forward · 10.0 tok/s wall · peak memory 3.0 MB · seed 9"
    )
    assert made.summary() == (
        "Prompt: 6 tokens, 12.000 tokens-per-sec\n"
        "Generation: 20 tokens, 13.333 tokens-per-sec\n"
        "Denoising: 3 steps, 6.667 tokens-per-forward\nPeak memory: 0.003 GB"
    )
    assert made.finish_reason == "stop"


def test_report_of_unfinished_and_of_many_canvases():
    made = report_of(PREFILLED, step(0), commit("a" * 16), step(0), step(1))
    assert made.tokens_per_forward == pytest.approx(16 / 3)
    assert "1 canvas (1 step) and 2 steps of one not finished ·" in made.line()
    nothing = report_of(PREFILLED, step(0))
    assert "· 0 committed tokens · 0 canvases and 1 step of one not" in nothing.line()
    few = report_of(*[commit("a", steps=5)] * 8)
    assert "8 canvases (5 + 5 + 5 + 5 + 5 + 5 + 5 + 5 steps)" in few.line()
    many = report_of(*[commit("a", steps=5)] * 8, commit("a", steps=12))
    assert "9 canvases (5.8 steps each, at most 12)" in many.line()
    assert report.format_bytes(52_345_000_000) == "52.34 GB"
