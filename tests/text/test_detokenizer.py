"""Decoding piece by piece is decoding at once."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from toy_tokenizers import NAMES, SPECIAL

from mlx_dgemma.text.tokenizer import Detokenizer, Tokenizer

relaxed = settings(deadline=None, max_examples=25)
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["hello", " hello", "  ", "▁", "日本", "🎉", *SPECIAL]),
    ),
    max_size=8,
).map("".join)
splits = st.lists(st.integers(0, 80), max_size=12)
garbage = st.lists(st.one_of(st.integers(-3, 420), st.integers(-(2**70), 2**70)))


def stream(tokenizer: Tokenizer, ids: list[int], chunk_ends) -> list[str]:
    """What a detokenizer returns when `ids` are cut at `chunk_ends`."""
    detokenizer = tokenizer.detokenizer()
    edges = [0, *sorted(min(cut, len(ids)) for cut in chunk_ends), len(ids)]
    said = [detokenizer.add(ids[a:b]) for a, b in pairwise(edges)]
    return [*said, detokenizer.finish()]


def one_by_one(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return stream(tokenizer, ids, range(len(ids)))


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(text=texts, ids=garbage, chunk_ends=splits)
def test_any_split_gives_the_whole_text(loaded, name, text, ids, chunk_ends):
    tokenizer = loaded[name]
    for tokens in (tokenizer.encode(text), ids):
        whole = tokenizer.decode(tokens)
        assert "".join(stream(tokenizer, tokens, chunk_ends)) == whole
        assert "".join(one_by_one(tokenizer, tokens)) == whole


@pytest.mark.parametrize("name", NAMES)
def test_random_ids_and_spaces_one_by_one(loaded, name):
    tokenizer = loaded[name]
    rng = random.Random(7)
    rows = [rng.choices(range(tokenizer.vocab_size), k=n) for n in range(1, 60)]
    rows += map(tokenizer.encode, ["  hello", "   ", " ", "helo lo", "h🎉 lo", "a a"])
    space, hello = tokenizer.token_id("▁") or 0, tokenizer.encode("hello")
    rows.append([space, *hello, *[space] * 6, *hello])
    for ids in rows:
        assert "".join(one_by_one(tokenizer, ids)) == tokenizer.decode(ids)


@relaxed
@given(text=st.text(), ids=st.lists(st.integers(0, 250), max_size=40))
def test_decode_inverts_encode_and_is_what_tokenizers_decodes(
    loaded, folders, text, ids
):
    plain = text.replace("▁", "")  # the piece that stands for a space
    for name in ("byte_level", "byte_fallback", "sentencepiece_plain"):
        assert loaded[name].decode(loaded[name].encode(plain)) == plain
    for name in ("byte_level", "byte_fallback", "word_piece"):
        fast = Fast.from_file(str(folders[name] / "tokenizer.json"))
        assert loaded[name].decode(ids) == fast.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece"])
def test_no_part_of_a_character_is_returned(loaded, name):
    tokenizer = loaded[name]
    for text in ("日本語🎉 ok", "x🎉🎉y", "👩‍👩‍👧", "é"):
        said = one_by_one(tokenizer, tokenizer.encode(text))
        assert "".join(said) == text
        assert not any("\ufffd" in piece for piece in said)
    ids = tokenizer.encode("hello🎉")
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add(ids[:-1]) == "hello"
    assert detokenizer.add([]) == ""
    rest = detokenizer.finish()
    assert set(rest) == {"\ufffd"}
    assert "hello" + rest == tokenizer.decode(ids[:-1])
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", NAMES)
def test_text_is_returned_as_soon_as_it_is_final(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("hello world hello")
    *said, rest = one_by_one(tokenizer, ids)
    if name == "rewriting":  # here "o " becomes "0"
        assert (rest, set(said)) == ("hell0world hello", {""})
    else:
        assert rest == ""
        assert len([piece for piece in said if piece]) > 2


def test_sentencepiece_drops_the_first_space(loaded):
    ids = loaded["sentencepiece"].encode("hello world")
    assert loaded["sentencepiece"].token(ids[0]).startswith("▁")
    assert loaded["sentencepiece"].decode([2, *ids]) == "hello world"
    plain = loaded["sentencepiece_plain"]
    assert plain.decode(plain.encode("  hello")) == "  hello"


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
    if name in ("byte_level", "byte_fallback", "sentencepiece"):
        shown = tokenizer.encode("<bos>hello<eos>")
        assert tokenizer.decode(shown, skip_special_tokens=False) == "<bos>hello<eos>"


@pytest.mark.parametrize("piece", ["x", "\ufffd", "<0xFF>"])
def test_decoding_takes_linear_time(piece):
    joined = 0

    def join(pieces: list[str]) -> str:
        nonlocal joined
        joined += len(pieces)
        return "".join(pieces)

    detokenizer = Detokenizer(lambda ids: [piece] * len(ids), join)
    for _ in range(2000):
        detokenizer.add([0])
    detokenizer.finish()
    assert joined < 15 * 2000
