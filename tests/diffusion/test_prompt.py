"""Messages with pictures to what the engine takes."""

import pytest
from eyed import asked, drawn, picture, text, write_eyed
from mlx_dgemma.diffusion.image_spans import keys_of

from mlx_dgemma import load
from mlx_dgemma.diffusion.prompt import EncodedPrompt, encode_prompt
from mlx_dgemma.errors import MediaError, SettingsError

IMAGE, BEGIN, END = 9, 7, 8


@pytest.fixture(scope="module")
def eyed(tmp_path_factory):
    return load(write_eyed(tmp_path_factory.mktemp("eyed") / "m"))


def test_a_picture_takes_a_token_for_each_of_its_squares(eyed):
    model, tokenizer = eyed
    parts = picture(drawn(60, 40)), text("ab"), picture(drawn(30, 90)), text("c")
    ready = encode_prompt(model, tokenizer, asked(*parts))
    first, second = ready.image_spans
    assert first.picture.soft_tokens > 1 and second.picture.soft_tokens > 1
    for place in ready.image_spans:
        span = ready.ids[place.start : place.end]
        assert span == [IMAGE] * place.picture.soft_tokens
        assert ready.ids[place.start - 1] == BEGIN and ready.ids[place.end] == END
    between = ready.ids[first.end + 1 : second.start - 1]
    assert tokenizer.decode(between) == "ab"
    assert ready.ids.count(IMAGE) == sum(
        p.picture.soft_tokens for p in ready.image_spans
    )


def test_keys_tell_pictures_apart_and_places_in_them(eyed):
    model, tokenizer = eyed
    one, same, other = (
        encode_prompt(model, tokenizer, asked(picture(drawn(60, 40, seed)), text("a")))
        for seed in (0, 0, 1)
    )
    assert one.ids == other.ids
    keys = keys_of(one.ids, one.image_spans)
    assert (
        keys
        == keys_of(same.ids, same.image_spans)
        != keys_of(other.ids, other.image_spans)
    )
    (place,) = one.image_spans
    inside = keys[place.start : place.end]
    assert len(set(inside)) == len(inside) and max(inside) < 0
    outside = keys[: place.start] + keys[place.end :]
    assert outside == one.ids[: place.start] + one.ids[place.end :]


def test_text_is_text(eyed):
    model, tokenizer = eyed
    ready = encode_prompt(model, tokenizer, asked(text("ab")))
    assert keys_of(ready.ids, ready.image_spans) == ready.ids
    assert encode_prompt(model, tokenizer, [3, 4]) == EncodedPrompt([3, 4])


def test_a_picture_read_before_is_not_read_again(eyed, tmp_path):
    model, tokenizer = eyed
    file = tmp_path / "a.png"
    drawn(60, 40).save(file)
    ready = encode_prompt(model, tokenizer, asked(picture(str(file)), text("a")))
    (place,) = ready.image_spans
    file.unlink()
    again = encode_prompt(model, tokenizer, asked(picture(place.picture), text("a")))
    assert again.image_spans[0].picture is place.picture and again.ids == ready.ids
    with pytest.raises(MediaError, match=r"picture 1: .*a\.png"):
        encode_prompt(model, tokenizer, asked(picture(str(file))))


def test_a_text_cannot_spell_a_picture(eyed):
    model, tokenizer = eyed
    with pytest.raises(SettingsError, match="2 image tokens and 1 pictures"):
        encode_prompt(model, tokenizer, asked(picture(drawn(60, 40)), text("2")))
    with pytest.raises(SettingsError, match="1 image tokens and 0 pictures"):
        encode_prompt(model, tokenizer, asked(text("2")))


def test_a_checkpoint_without_a_tower_says_so(tiny_model):
    model, tokenizer = tiny_model
    with pytest.raises(SettingsError, match=r"holds pictures, .*reads text only"):
        encode_prompt(model, tokenizer, asked(picture(drawn(9, 9))))
