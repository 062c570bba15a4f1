"""Decoding piece by piece is decoding at once."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from toy_tokenizers import NAMES, SPECIAL

from mlx_dgemma.text.detokenizer import SegmentStream, byte_of_char, piece_bytes
from mlx_dgemma.text.tokenizer import Tokenizer

relaxed = settings(deadline=None, max_examples=80)
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["hello", " hello", "  ", "▁", "日本", "🎉", *SPECIAL]),
    ),
    max_size=8,
).map("".join)
splits = st.lists(st.integers(0, 80), max_size=12)
garbage = st.lists(st.one_of(st.integers(-3, 420), st.integers(-(2**70), 2**70)))


def stream(tokenizer: Tokenizer, ids: list[int], chunk_ends: list[int]) -> list[str]:
    """What a detokenizer says when `ids` are cut at `chunk_ends`."""
    detokenizer = tokenizer.detokenizer()
    edges = [0, *sorted(min(cut, len(ids)) for cut in chunk_ends), len(ids)]
    said = [detokenizer.add(ids[a:b]) for a, b in pairwise(edges)]
    return [*said, detokenizer.finish()]


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(text=texts, chunk_ends=splits)
def test_any_split_of_a_text_is_the_whole(loaded, name, text, chunk_ends):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, chunk_ends)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(ids=garbage, chunk_ends=splits)
def test_any_split_of_garbage_is_the_whole(loaded, name, ids, chunk_ends):
    tokenizer = loaded[name]
    whole = tokenizer.decode(ids)
    assert "".join(stream(tokenizer, ids, chunk_ends)) == whole
    assert "".join(stream(tokenizer, ids, list(range(len(ids))))) == whole


@pytest.mark.parametrize("name", NAMES)
def test_random_ids_one_by_one_are_the_whole(loaded, name):
    tokenizer = loaded[name]
    rng = random.Random(7)
    for length in range(1, 60):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        said = stream(tokenizer, ids, list(range(length)))
        assert "".join(said) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["  hello", "   ", " ", "helo lo", "h🎉 lo", "a a"])
def test_beginnings_and_seams_one_by_one(loaded, name, text):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    said = stream(tokenizer, ids, list(range(len(ids))))
    assert "".join(said) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece_plain"])
@relaxed
@given(text=st.text())
def test_bytes_make_every_text_return(loaded, name, text):
    tokenizer = loaded[name]
    plain = text.replace("▁", "")  # sentencepiece's own word for a space
    assert tokenizer.decode(tokenizer.encode(plain)) == plain


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece"])
@pytest.mark.parametrize("text", ["日本語🎉 ok", "x🎉🎉y", "👩‍👩‍👧", "é"])
def test_no_part_of_a_character_is_said(loaded, name, text):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    said = stream(tokenizer, ids, list(range(len(ids))))
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece"])
def test_an_unfinished_character_waits_for_finish(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("hello🎉")
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add(ids[:-1]) == "hello"
    assert detokenizer.add([]) == ""
    rest = detokenizer.finish()
    assert rest != ""
    assert set(rest) == {"\ufffd"}
    assert "hello" + rest == tokenizer.decode(ids[:-1])
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "stripping"])
def test_text_is_said_as_soon_as_it_is_final(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("hello hello hello")
    said = stream(tokenizer, ids, list(range(len(ids))))
    assert said[-1] == ""
    assert len([piece for piece in said if piece]) > 2


def test_the_first_space_rule_of_sentencepiece(loaded):
    tokenizer = loaded["sentencepiece"]
    ids = tokenizer.encode("hello world")
    assert tokenizer.token(ids[0]).startswith("▁")
    assert tokenizer.decode(ids) == "hello world"
    said = stream(tokenizer, [2, *ids], list(range(len(ids) + 1)))
    assert "".join(said) == "hello world"
    assert loaded["sentencepiece_plain"].decode(
        loaded["sentencepiece_plain"].encode("  hello")
    ) == ("  hello")


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_hidden(loaded, name):
    tokenizer = loaded[name]
    bos, turn = tokenizer.token_id("<bos>"), tokenizer.token_id("<|turn>")
    hello = tokenizer.encode("hello")
    ids = [bos, *hello, turn]
    assert {bos, turn} <= tokenizer.special_ids
    assert tokenizer.decode(ids) == tokenizer.decode(hello)
    assert "".join(stream(tokenizer, ids, [1, 2])) == tokenizer.decode(hello)
    assert tokenizer.decode([bos, turn, bos]) == ""


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece"])
def test_special_tokens_can_be_shown(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("<bos>hello<eos>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>hello<eos>"


@relaxed
@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_byte_stream_reads_bytes_as_tokenizers_does(loaded, ids):
    whole = loaded["byte_level"].decode(ids)
    assert "".join(stream(loaded["byte_level"], ids, list(range(40)))) == whole


@given(st.binary(max_size=12))
def test_the_byte_alphabet_is_tokenizers_own(data):
    alphabet = {byte: char for char, byte in byte_of_char().items()}
    piece = "".join(alphabet[byte] for byte in data)
    assert piece_bytes(piece) == data
    assert set(byte_of_char()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_decoding_is_linear():
    read = 0

    def join(pieces: list[str]) -> str:
        nonlocal read
        read += len(pieces)
        return "".join(pieces)

    segments = SegmentStream(join, lambda piece: piece == "?")
    for i in range(2000):
        segments.add(["?" if i % 40 else "x"])
    segments.finish()
    assert read < 3 * 2000
