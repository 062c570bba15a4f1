"""Text around the engine: streaming, stop strings, seeds, settings."""

import pytest
from mlx_dgemma.diffusion.stop import StopFilter
from tiny import VOCABULARY

from mlx_dgemma import Commit, Prefilled, Step, generate, stream_generate
from mlx_dgemma.diffusion.report import Report
from mlx_dgemma.errors import SettingsError
from mlx_dgemma.text.replies import Answer

LOOSE = {
    "max_tokens": 64,
    "steps": 6,
    "entropy_bound": 8.0,
    "confidence": 2.0,
    "seed": 0,
}


def text_of(events) -> str:
    return "".join(e.text for e in events if isinstance(e, Commit))


def seed_of_long_text(model, tokenizer) -> int:
    """A seed whose text spans several canvases."""
    for seed in range(50):
        events = list(stream_generate(model, tokenizer, "ab", **LOOSE | {"seed": seed}))
        if sum(isinstance(e, Commit) for e in events) > 2:
            return seed
    raise AssertionError("no seed gives a long text")


def test_stream_and_generate_give_the_same_text(tiny_model):
    events = list(stream_generate(*tiny_model, "12\nab", **LOOSE))
    assert text_of(events) == generate(*tiny_model, "12\nab", **LOOSE)
    assert isinstance(events[0], Prefilled)
    assert isinstance(events[-1], Commit) and events[-1].finish_reason


def test_prompts_may_be_text_ids_or_messages(tiny_model):
    model, tokenizer = tiny_model
    text = generate(model, tokenizer, "12ab", **LOOSE)
    messages = [{"role": "user", "content": "12ab"}]
    assert generate(model, tokenizer, messages, **LOOSE) == text
    ids = tokenizer.apply_chat_template(messages, tokenize=True)
    assert generate(model, tokenizer, ids, **LOOSE) == text


def test_a_seed_is_chosen_and_reported(tiny_model):
    loose = {k: v for k, v in LOOSE.items() if k != "seed"}
    events = list(stream_generate(*tiny_model, "ab", **loose))
    assert isinstance(events[0], Prefilled)
    again = generate(*tiny_model, "ab", seed=events[0].seed, **loose)
    assert again == text_of(events)
    other = next(iter(stream_generate(*tiny_model, "ab", **loose)))
    assert isinstance(other, Prefilled) and other.seed != events[0].seed


def test_unknown_settings_are_refused(tiny_model):
    with pytest.raises(SettingsError, match="'temperature' is no setting"):
        generate(*tiny_model, "ab", temperature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": [""]}, "must be strings"),
        ({"stop": 5}, "stop is 5"),
        ({"prefill_step_size": "8"}, "prefill_step_size is '8'"),
        ({"eos": 4}, "eos is 4"),
        ({"pinned": [1]}, r"pinned is \[1\]"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_impossible_settings_are_refused(tiny_model, changes, message):
    with pytest.raises(SettingsError, match=message):
        generate(*tiny_model, "ab", **changes)
    with pytest.raises(SettingsError, match=message):
        stream_generate(*tiny_model, "ab", **changes)  # before the first event


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_ends_the_text_wherever_it_lies(tiny_model, size):
    """Also across the border of two canvases: every third place is tried."""
    loose = LOOSE | {"seed": seed_of_long_text(*tiny_model)}
    whole = generate(*tiny_model, "ab", **loose)
    for start in range(0, len(whole) - size, 3):
        stop = whole[start : start + size]
        events = list(stream_generate(*tiny_model, "ab", stop=[stop], **loose))
        assert text_of(events) == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"


def test_tokens_end_where_the_text_ends(tiny_model):
    _, tokenizer = tiny_model
    loose = LOOSE | {"seed": seed_of_long_text(*tiny_model)}
    whole = generate(*tiny_model, "ab", **loose)
    for stop in (whole[9:12], whole[22:24]):
        events = list(stream_generate(*tiny_model, "ab", stop=stop, **loose))
        tokens = [t for e in events if isinstance(e, Commit) for t in e.tokens]
        assert tokenizer.decode(tokens) == text_of(events) == whole[: whole.index(stop)]


def test_events_may_be_pulled_from_one_thread_after_another(tiny_model):
    from concurrent.futures import ThreadPoolExecutor

    loose = LOOSE | {"seed": seed_of_long_text(*tiny_model), "pinned": {3: 9}}
    stream = stream_generate(*tiny_model, "ab", **loose)
    events = []
    while not events or events[-1] is not None:
        with ThreadPoolExecutor(1) as pool:  # a new thread for each event
            events.append(pool.submit(next, stream, None).result())
    assert text_of(events[:-1]) == generate(*tiny_model, "ab", **loose)


def test_the_earliest_of_several_stop_strings_wins(tiny_model):
    loose = LOOSE | {"seed": seed_of_long_text(*tiny_model)}
    whole = generate(*tiny_model, "ab", **loose)
    stops = [whole[20:23], whole[9:12], "never"]
    cut = min(whole.index(s) for s in stops[:2])
    assert generate(*tiny_model, "ab", stop=stops, **loose) == whole[:cut]


def test_a_stop_string_that_never_comes_holds_nothing_back(tiny_model):
    loose = LOOSE | {"seed": seed_of_long_text(*tiny_model)}
    whole = generate(*tiny_model, "ab", **loose)
    stop = whole[-1] + "never"
    assert generate(*tiny_model, "ab", stop=[stop], **loose) == whole


def test_no_draft_contains_text_of_a_held_back_stop_string():
    """StopFilter: what might begin a stop string waits for the next commit."""

    class Echo:
        def add(self, tokens):
            return [Answer("".join(map(chr, tokens)))]

        def finish(self):
            return []

    def commit(text, reason=None):
        return Commit(
            request=0,
            canvas_index=0,
            tokens=tuple(map(ord, text)),
            steps=1,
            finish_reason=reason,
        )

    writer = StopFilter(Echo(), ["END."])
    assert writer.write(commit("one EN")).text == "one "
    assert writer.write(commit("Dless ")).text == "ENDless "
    assert writer.write(commit("E")).text == ""
    last = writer.write(commit("ND. more", "length"))
    assert (last.text, last.finish_reason) == ("", "stop")


def test_closing_the_stream_ends_the_request(tiny_model):
    stream = stream_generate(*tiny_model, "ab", **LOOSE)
    next(stream)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_special_tokens_are_hidden_from_text(tiny_model):
    model, tokenizer = tiny_model
    changes = LOOSE | {"pinned": {0: 3, 1: 10, 2: 2, 3: 11, 4: 1}}
    assert generate(model, tokenizer, "ab", **changes) == (
        VOCABULARY[10] + VOCABULARY[11]
    )


def test_the_report_counts_what_happened(tiny_model):
    report = Report()
    events = list(stream_generate(*tiny_model, "ab", **LOOSE))
    for event in events:
        report.add(event)
    commits = [e for e in events if isinstance(e, Commit)]
    assert report.committed_tokens == sum(len(c.tokens) for c in commits)
    assert report.denoising_steps == sum(isinstance(e, Step) for e in events)
    assert report.steps_per_canvas == [c.steps for c in commits]
    assert report.tokens_per_forward == pytest.approx(
        report.committed_tokens / report.denoising_steps
    )
    assert f"seed {LOOSE['seed']}" in report.line()


def test_a_model_loaded_in_one_thread_generates_in_another(tiny):
    """Unevaluated weights would belong to the thread that loaded them."""
    from concurrent.futures import ThreadPoolExecutor

    from mlx_dgemma import load

    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as worker:
        model, tokenizer = loader.submit(load, tiny).result()
        text = worker.submit(generate, model, tokenizer, "ab", **LOOSE).result()
    assert text == generate(*load(tiny), "ab", **LOOSE)


@pytest.mark.parametrize("name", ["sudoku4", "folder"])
def test_a_revision_of_what_is_no_hub_id_is_refused(tiny, name):
    from mlx_dgemma import load
    from mlx_dgemma.errors import HubError

    with pytest.raises(HubError, match="is no hub id, so it has no revision 'v2'"):
        load(tiny if name == "folder" else name, revision="v2")


def test_an_endless_name_is_refused_in_one_line():
    from mlx_dgemma import load
    from mlx_dgemma.errors import HubError

    with pytest.raises(HubError, match="File name too long"):
        load("a" * 5000)
