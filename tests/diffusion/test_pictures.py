"""Pictures through the whole of it: generation, reuse, and turns of talk."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_vision import asked, drawn, picture, text, write_tiny_vision

from mlx_dgemma import Commit, generate, load, stream_generate
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.prefix import Prefix
from mlx_dgemma.diffusion.prompt import encode_prompt
from mlx_dgemma.errors import MediaError, SettingsError

LOOSE = {"max_tokens": 32, "steps": 4, "entropy_bound": 8.0}
SEE = {"max_tokens": 16, "steps": 4}


@pytest.fixture(scope="module")
def eyed(tmp_path_factory):
    return load(write_tiny_vision(tmp_path_factory.mktemp("eyed") / "m"))


def test_what_is_seen_changes_the_answer(eyed):
    answers = {
        generate(*eyed, "abc", images=[drawn(70, 50, seed)], seed=0, **LOOSE)
        for seed in range(6)
    }
    assert len(answers) > 1
    same = [generate(*eyed, "abc", images=[drawn(70, 50)], seed=0, **LOOSE)] * 2
    assert same[0] == generate(*eyed, "abc", images=[drawn(70, 50)], seed=0, **LOOSE)


def test_images_before_a_text_are_parts_of_a_message(eyed):
    image = drawn(70, 50)
    messages = asked(picture(image), text("abc"))
    assert generate(*eyed, "abc", images=[image], seed=3, **LOOSE) == generate(
        *eyed, messages, seed=3, **LOOSE
    )


def prefix_of(eyed, messages, step: int) -> np.ndarray:
    """Logits of one canvas behind a prompt, encoded `step` tokens at a time."""
    model, tokenizer = eyed
    ready, engine = encode_prompt(model, tokenizer, messages), Engine(model)
    settings = model.settings.replace(**SEE)
    engine.admit(ready.ids, settings, 0, step, image_spans=ready.image_spans)
    canvas = mx.array(np.arange(16, dtype=np.int32)[None])
    return np.array(model.denoise(canvas, engine.running[0].prefix))


def test_any_chunks_leave_pictures_whole(eyed):
    parts = picture(drawn(60, 40)), text("ab" * 9), picture(drawn(20, 90)), text("c")
    whole = prefix_of(eyed, asked(*parts), 2048)
    for step in (1, 5, 32):
        np.testing.assert_allclose(
            prefix_of(eyed, asked(*parts), step), whole, atol=1e-4
        )


def test_the_same_picture_is_not_looked_at_again(eyed, monkeypatch):
    model, tokenizer = eyed
    looks, look = [], model.vision.look
    monkeypatch.setattr(model.vision, "look", lambda *a: looks.append(1) or look(*a))
    prefix, engine = Prefix(model), Engine(model)
    settings = model.settings.replace(max_tokens=16, steps=2)
    found = []
    for seed, words in ((0, "ab"), (0, "abab"), (1, "ab")):
        # the picture closes a chunk, so it is kept whatever follows
        parts = text("x" * 9), picture(drawn(60, 40, seed)), text("y" * 9), text(words)
        ready = encode_prompt(model, tokenizer, asked(*parts))
        given = ready.ids, settings, 0, 16
        found.append(engine.admit(*given, prefix=prefix, image_spans=ready.image_spans))
        list(engine.run())
    assert len(looks) == 2  # the first and the one with other pixels
    assert found[1].reused > 9 and found[2].reused <= 9 + 2


def test_a_talk_about_pictures_is_the_same_with_and_without_reuse(eyed):
    """Turns, a rewind and another picture; each answer as of a fresh prompt."""
    talk = Conversation(*eyed, **LOOSE)
    said = [
        [text("ab"), picture(drawn(50, 50))],
        "c" * 40,
        [picture(drawn(90, 20, 2)), picture(drawn(20, 30, 3)), text("b")],
    ]
    for turn, content in enumerate(said):
        if turn == 2:
            talk.rewind()
        events = list(talk.ask(content, seed=turn))
        history = talk.messages[:-1]
        fresh = list(stream_generate(*eyed, history, seed=turn, **LOOSE))
        texts = [
            [e.text for e in some if isinstance(e, Commit)] for some in (events, fresh)
        ]
        assert texts[0] == texts[1]


def test_a_picture_that_was_shown_stays_what_it_was(eyed, tmp_path):
    file = tmp_path / "a.png"
    drawn(60, 40).save(file)
    talk = Conversation(*eyed, **LOOSE)
    list(talk.ask([picture(str(file)), text("a")], seed=0))
    file.unlink()
    list(talk.ask("b", seed=0))
    (shown,) = [p for p in talk.messages[0]["content"] if p["type"] == "image"]
    assert shown["image"].soft_tokens > 1
    with pytest.raises(MediaError):
        talk.ask([picture(str(file))])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"images": ["a.png"], "prompt": [3, 4]}, "images go with a text prompt"),
        ({"images": [3], "prompt": "a"}, "."),
    ],
)
def test_what_is_no_picture_is_refused(eyed, given, told):
    with pytest.raises((SettingsError, MediaError), match=told):
        generate(*eyed, given["prompt"], images=given["images"])


def test_a_checkpoint_for_text_refuses_pictures(tiny_model):
    with pytest.raises(SettingsError, match="reads text only"):
        generate(*tiny_model, "a", images=[drawn(9, 9)])
    with pytest.raises(SettingsError, match="reads text only"):
        Conversation(*tiny_model).ask([picture(drawn(9, 9))])


def test_a_video_is_its_frames_each_behind_its_time(eyed, monkeypatch):
    """As transformers' processor words it: minute and second, then the picture."""
    from mlx_dgemma.diffusion import prompt
    from mlx_dgemma.media import videos
    from mlx_dgemma.media.images import ImageBudget, read_picture

    frames = [
        (seconds, read_picture(drawn(40, 30, seed), ImageBudget(70, 4)))
        for seed, seconds in enumerate((0.0, 1.2, 61.9))
    ]
    monkeypatch.setattr(videos, "read_frames", lambda path: frames)
    parts = prompt.frame_parts("a.mp4")
    texts = [part["text"] for part in parts if part["type"] == "text"]
    assert texts == ["00:00 ", " 00:01 ", " 01:01 "]
    shown = [part["image"] for part in parts if part["type"] == "image"]
    assert shown == [picture for _, picture in frames]
    model, tokenizer = eyed
    monkeypatch.setattr(prompt, "frame_parts", lambda path: parts[1::2])
    ready = encode_prompt(model, tokenizer, "abc", videos=["a.mp4"])
    assert [place.picture for place in ready.image_spans] == shown
    assert tokenizer.decode(ready.ids[ready.image_spans[-1].end + 1 :]).endswith("abc")
