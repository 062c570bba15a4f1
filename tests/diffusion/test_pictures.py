"""Pictures and videos in prompts: encoding, generation, reuse, conversations."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_vision import asked, drawn, picture, text, write_tiny_vision

from mlx_dgemma import generate, load, stream_generate
from mlx_dgemma.diffusion import prompt as prompts
from mlx_dgemma.diffusion.conversation import Conversation
from mlx_dgemma.diffusion.engine import Engine
from mlx_dgemma.diffusion.prefix import Prefix, prefix_keys
from mlx_dgemma.diffusion.prompt import encode_prompt
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
    model, tokenizer = seeing
    parts = picture(drawn(60, 40)), text("ab"), picture(drawn(30, 90)), text("c")
    encoded = encode_prompt(model, tokenizer, asked(*parts))
    first, second = encoded.image_spans
    for span in encoded.image_spans:
        ids = encoded.ids[span.start : span.end]
        assert ids == [IMAGE] * span.picture.soft_tokens and len(ids) > 1
        assert encoded.ids[span.start - 1] == BEGIN and encoded.ids[span.end] == END
    between = encoded.ids[first.end + 1 : second.start - 1]
    assert tokenizer.decode(between) == "ab"


def test_keys_differ_by_picture_and_by_place_in_it(seeing):
    one, same, other = (
        encode_prompt(*seeing, asked(picture(drawn(60, 40, seed)), text("a")))
        for seed in (0, 0, 1)
    )
    assert one.ids == other.ids
    keys, again, others = (
        prefix_keys(e.ids, e.image_spans) for e in (one, same, other)
    )
    assert keys == again != others
    (span,) = one.image_spans
    inside = keys[span.start : span.end]
    assert len(set(inside)) == len(inside) and max(inside) < 0
    assert keys[: span.start] == one.ids[: span.start]
    assert keys[span.end :] == one.ids[span.end :]


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
    model, tokenizer = seeing
    parts = picture(drawn(60, 40)), text("ab" * 9), picture(drawn(20, 90)), text("c")
    encoded, logits = encode_prompt(model, tokenizer, asked(*parts)), []
    for chunk in (2048, 1, 5, 32):
        engine = Engine(model)
        spans = encoded.image_spans
        engine.admit(encoded.ids, model.settings, 0, chunk, image_spans=spans)
        canvas = mx.array(np.arange(16, dtype=np.int32)[None])
        logits.append(np.array(model.denoise(canvas, engine.running[0].cache)))
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)


def test_pictures_in_a_reused_prefix_are_not_encoded_again(seeing, monkeypatch):
    model, tokenizer = seeing
    calls, encode = [], model.vision.encode_image

    def counted(*given):
        calls.append(given)
        return encode(*given)

    monkeypatch.setattr(model.vision, "encode_image", counted)
    prefix, engine, found = Prefix(model), Engine(model), []
    settings = model.settings.replace(max_tokens=16, steps=2)
    for seed, words in ((0, "ab"), (0, "abab"), (1, "ab")):
        # the picture ends a chunk, so it is kept whatever follows
        parts = text("x" * 9), picture(drawn(60, 40, seed)), text("y" * 9), text(words)
        encoded = encode_prompt(model, tokenizer, asked(*parts))
        given, spans = (encoded.ids, settings, 0, 16), encoded.image_spans
        found.append(engine.admit(*given, prefix=prefix, image_spans=spans))
        list(engine.run())
    assert len(calls) == 2  # the first and the one with other pixels
    assert found[1].reused > 9 and found[2].reused <= 9 + 2


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
        answer = "".join(e.text for e in talk.ask(content, seed=turn))
        fresh = stream_generate(*seeing, talk.messages[:-1], seed=turn, **SHORT)
        assert answer == "".join(e.text for e in fresh)
    question, *_ = talk.transcript()
    assert question == {"role": "user", "content": [picture(str(file)), text("ab")]}
    assert talk.messages[0]["content"][0]["image"].soft_tokens > 1
    assert len(talk.messages) == 4


def test_video_is_its_frames_each_behind_its_time(seeing, monkeypatch):
    """As transformers' processor writes it: minute and second, then the picture."""
    frames = [
        (seconds, read_picture(drawn(40, 30, seed), ImageBudget(70, 4)))
        for seed, seconds in enumerate((0.0, 1.2, 61.9))
    ]
    monkeypatch.setattr(videos, "read_frames", lambda path: frames)
    parts = prompts.frame_parts("a.mp4")
    texts = [part["text"] for part in parts if part["type"] == "text"]
    assert texts == ["00:00 ", " 00:01 ", " 01:01 "]
    images = [part["image"] for part in parts if part["type"] == "image"]
    assert images == [picture for _, picture in frames]
    model, tokenizer = seeing
    monkeypatch.setattr(prompts, "frame_parts", lambda path: parts[1::2])
    encoded = encode_prompt(model, tokenizer, "abc", videos=["a.mp4"])
    assert [span.picture for span in encoded.image_spans] == images
    rest = encoded.ids[encoded.image_spans[-1].end + 1 :]
    assert tokenizer.decode(rest).endswith("abc")
