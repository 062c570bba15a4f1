"""Pictures and videos in prompts: encoding, generation, reuse, conversations."""

import mlx.core as mx
import numpy as np
import pytest
from exactly import exactly
from tiny_vision import asked, drawn, picture, text, write_tiny_vision

from mlx_dgemma import Conversation, Engine, Prefix, generate, load, stream_generate
from mlx_dgemma.diffusion import generation
from mlx_dgemma.diffusion.generation import encode_prompt, frame_parts
from mlx_dgemma.errors import MediaError, SettingsError
from mlx_dgemma.media import videos
from mlx_dgemma.media.images import ImageBudget, read_picture

IMAGE, BEGIN, END = 9, 7, 8
SHORT = {"max_tokens": 16, "steps": 2, "entropy_bound": 8.0}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The tiny model with a vision tower."""
    return load(write_tiny_vision(tmp_path_factory.mktemp("seeing") / "m"))


def test_picture_takes_one_id_per_soft_token(seeing):
    parts = picture(drawn(60, 40)), text("ab"), picture(drawn(30, 90)), text("c")
    ids, (first, second) = encode_prompt(*seeing, asked(*parts))
    for span in (first, second):
        inside = ids[span.start : span.end]
        assert inside == [IMAGE] * span.picture.soft_tokens and len(inside) > 1
        assert (ids[span.start - 1], ids[span.end]) == (BEGIN, END)
    assert seeing[1].decode(ids[first.end + 1 : second.start - 1]) == "ab"


def test_invalid_pictures_and_places_are_refused(seeing, tiny_model, tmp_path):
    image, missing = drawn(9, 9), str(tmp_path / "a.png")
    for model, prompt, images, message in (
        (seeing, asked(picture(image), text("2")), (), "2 image tokens and 1 pictures"),
        (seeing, asked(text("2")), (), "1 image tokens and 0 pictures"),
        (seeing, [3, 4], [image], "images and videos go with a text prompt"),
        (seeing, "<|turn>a", [image], "text prompt that is not rendered yet"),
        (seeing, "a", [missing], r"picture 1: .*a\.png"),
        (tiny_model, "a", [image], r"holds pictures, .*reads text only"),
    ):
        with pytest.raises((SettingsError, MediaError), match=message):
            generate(*model, prompt, images=images)
    for model in (tiny_model, seeing):
        with pytest.raises((SettingsError, MediaError), match=r"text only|a\.png"):
            Conversation(*model).ask("b", images=[missing])


def test_answer_depends_on_the_picture(seeing):
    def answer(seed: int) -> str:
        return generate(*seeing, "abc", images=[drawn(70, 50, seed)], seed=0, **SHORT)

    assert len({answer(seed) for seed in range(4)}) > 1
    messages = asked(picture(drawn(70, 50)), text("abc"))
    assert generate(*seeing, messages, seed=0, **SHORT) == answer(0)


def test_any_chunks_leave_pictures_whole(seeing):
    model, logits = seeing[0], []
    parts = picture(drawn(60, 40)), text("ab" * 9), picture(drawn(20, 90)), text("c")
    ids, spans = encode_prompt(*seeing, asked(*parts))
    for chunk in (2048, 1, 5, 32):
        prefix = Prefix(model)
        given = ids, model.settings, 0, chunk
        Engine(model).admit(*given, prefix=prefix, image_spans=spans)
        canvas = mx.array(np.arange(16, dtype=np.int32)[None])
        logits.append(np.array(model.denoise(canvas, prefix.cache)))
        np.testing.assert_allclose(logits[-1], logits[0], atol=1e-4)


def test_pictures_in_a_reused_prefix_are_not_encoded_again(seeing):
    prefix, engine, found = Prefix(seeing[0]), Engine(seeing[0]), []
    settings = seeing[0].settings.replace(max_tokens=16, steps=2)
    for seed, words in ((0, "ab"), (0, "abab"), (1, "ab")):
        # the picture ends a chunk, so it is kept whatever follows
        parts = text("x" * 9), picture(drawn(60, 40, seed)), text("y" * 9), text(words)
        ids, spans = encode_prompt(*seeing, asked(*parts))
        given = ids, settings, 0, 16
        admitted = engine.admit(*given, prefix=prefix, image_spans=spans)
        list(engine.run())
        found.append(admitted.reused >= spans[0].end)
    assert found == [False, True, False]  # the last has other pixels


def test_conversation_about_pictures_equals_fresh_prompts(seeing, tmp_path):
    """Turns, a rewind, other pictures, and a file that is gone after its turn."""
    file = tmp_path / "a.png"
    drawn(50, 50).save(file)
    talk = Conversation(*seeing, **SHORT)
    list(talk.ask("ab", images=[str(file)], seed=0))
    file.unlink()
    pictures = picture(drawn(90, 20, 2)), picture(drawn(20, 30, 3))
    for turn, content in enumerate(["c" * 40, [*pictures, text("b")]]):
        if turn == 1:
            talk.rewind()
        events = list(talk.ask(content, seed=turn))
        fresh = stream_generate(*seeing, talk.messages[:-1], seed=turn, **SHORT)
        assert exactly(events) == exactly(fresh)
    question, *_ = talk.transcript()
    assert question == {"role": "user", "content": [picture(str(file)), text("ab")]}


def test_video_is_its_frames_each_behind_its_time(seeing, monkeypatch):
    """As transformers' processor writes it: minute and second, then the picture."""
    frames = [
        (seconds, read_picture(drawn(40, 30, seed), ImageBudget(70, 4)))
        for seed, seconds in enumerate((0.0, 1.2, 61.9))
    ]
    # the tiny vocabulary has no colon, and its 0 to 2 mark pictures: times are no text
    monkeypatch.setattr(videos, "read_frames", lambda path, budget: frames)
    parts = frame_parts(seeing[0], "a.mp4")
    assert [p["text"] for p in parts[::2]] == ["00:00 ", " 00:01 ", " 01:01 "]
    monkeypatch.setattr(generation, "frame_parts", lambda model, path: parts[1::2])
    ids, spans = encode_prompt(*seeing, "abc", videos=["a.mp4"])
    assert [span.picture for span in spans] == [image for _, image in frames]
    assert seeing[1].decode(ids[spans[-1].end + 1 :]).endswith("abc")
