"""One pass over the vocabulary against the same in float64, all logits at once."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dgemma.model import vocab
from mlx_dgemma.model.layers import dequantize

CAP = 30.0
LAST = 1 - 2**-24  # the largest float32 uniform
ROUNDINGS = 8 * 2**-24  # of float32, that a logit goes through


@pytest.fixture(autouse=True)
def small_chunks(tuned):
    """Chunks of 128 tokens, so that small vocabularies have several."""
    tuned(vocabulary_chunk=128, vocabulary_rows=10_000)


def dense(matrix: np.ndarray) -> nn.Embedding:
    embedding = nn.Embedding(1, 1)
    embedding.weight = mx.array(matrix.astype(np.float32))
    return embedding


def read(embedding, hidden, temperatures, uniforms) -> vocab.VocabStats:
    given = hidden, temperatures, uniforms
    arrays = [mx.array(np.asarray(a, np.float32)) for a in given]
    return vocab.vocab_stats(embedding, *arrays, CAP)


@dataclass
class Exact:
    """What `vocab.vocab_stats` computes, written plainly."""

    x: np.ndarray  # (N, V) soft-capped logits over the temperature
    p: np.ndarray  # (N, V)
    entropy: np.ndarray
    signal: np.ndarray

    @classmethod
    def of(cls, matrix, hidden, temperatures) -> "Exact":
        E, h, t = (np.asarray(a, np.float64) for a in (matrix, hidden, temperatures))
        x = CAP * np.tanh(h @ E.T / CAP) / t[:, None]
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        p = e / e.sum(axis=-1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
        return cls(x, p, entropy, p @ E * np.sqrt(E.shape[1]))

    @property
    def rounding(self) -> float:
        """By how much a float32 logit may be off."""
        return ROUNDINGS * (1 + float(np.abs(self.x).max()))


def beside(p: np.ndarray, uniforms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How far each uniform lies outside its token's piece of the CDF."""
    rows, cdf = np.arange(len(p)), np.cumsum(p, axis=-1)
    low, high = (cdf - p)[rows, tokens], cdf[rows, tokens]
    return np.maximum(np.maximum(low - uniforms, uniforms - high), 0)


def check(stats: vocab.VocabStats, exact: Exact, matrix, uniforms) -> None:
    np.testing.assert_array_equal(np.array(stats.argmax), exact.x.argmax(axis=-1))
    np.testing.assert_allclose(np.array(stats.entropy), exact.entropy, atol=1e-4)
    peaks = exact.p.max(axis=-1)
    np.testing.assert_allclose(np.array(stats.peak), peaks, atol=exact.rounding)
    largest = np.abs(matrix).max() * np.sqrt(matrix.shape[1])
    np.testing.assert_allclose(
        np.array(stats.signal), exact.signal, atol=exact.rounding * largest
    )
    tokens = np.array(stats.sample)
    assert tokens.min() >= 0 and tokens.max() < len(matrix)
    near = max(1e-6, exact.rounding)  # colder logits are rounded by more
    assert beside(exact.p, uniforms, tokens).max() <= near


SIZES = [(5, 1.0), (63, 0.4), (64, 0.01), (65, 1.0), (128, 100.0), (191, None)]


@pytest.mark.parametrize(("size", "temperature"), [*SIZES, (1000, 0.4)])
def test_stats_are_what_all_logits_say(tuned, size, temperature):
    tuned(vocabulary_rows=70)  # three tiles
    rng = np.random.default_rng(size)
    matrix = rng.normal(size=(size, 48)).astype(np.float32) * 0.3
    hidden = rng.normal(size=(200, 48)).astype(np.float32)
    uniforms = rng.random(200).astype(np.float32)
    uniforms[:100:2], uniforms[1:100:2] = 0, LAST
    temperatures = np.full(200, temperature or 1, np.float32)
    if temperature is None:  # each position has its own
        temperatures = np.geomspace(0.1, 50, 200, dtype=np.float32)
    stats = read(dense(matrix), hidden, temperatures, uniforms)
    check(stats, Exact.of(matrix, hidden, temperatures), matrix, uniforms)


@pytest.mark.parametrize("rising", [1, -1])
def test_highest_logits_may_come_in_any_chunk(rising):
    """Later chunks far above or far below the first: sums move to the highest."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(700, 16)).astype(np.float32)
    matrix[:, 0] = np.linspace(-9, 9, 700)[::rising]
    hidden = rng.normal(size=(64, 16)).astype(np.float32) * 0.2
    hidden[:, 0] = np.linspace(0, 2, 64)
    given = hidden, np.ones(64, np.float32), rng.random(64).astype(np.float32)
    exact = Exact.of(matrix, *given[:2])
    assert np.median(exact.entropy) > 1  # many tokens have a share, over chunks
    check(read(dense(matrix), *given), exact, matrix, given[2])


def test_of_equal_logits_the_first_wins():
    for same in ((3, 9), (3, 200), (5, 128, 299)):
        matrix = np.random.default_rng(5).integers(-2, 3, (300, 8))
        matrix[list(same)] = 3  # small whole numbers: their products are exact
        stats = read(dense(matrix), np.ones((2, 8)), [1.0, 0.5], [0.5, 0.5])
        assert np.array(stats.argmax).tolist() == [same[0]] * 2


def test_impossible_tokens_are_never_sampled():
    """Those whose e is 0 in float32, whether the uniform is at either end."""
    rng = np.random.default_rng(6)
    uniforms = np.concatenate([[0.0, 2**-24, LAST], rng.random(2000)])
    given = np.ones((2003, 1)), np.full(2003, 0.1), uniforms
    for possible in ((40,), (0, 299), (66, 67, 127), (63, 64, 191, 192)):
        matrix = np.full((300, 1), -100.0)
        matrix[list(possible)] = 100.0
        tokens = np.array(read(dense(matrix), *given).sample)
        assert set(tokens.tolist()) == set(possible)
        assert (tokens[0], tokens[2]) == (possible[0], possible[-1])
        share = np.minimum(uniforms * len(possible), len(possible) - 1e-6).astype(int)
        assert (tokens == np.array(possible)[share]).mean() > 0.999
    # also where those behind the last possible one, in its block, weigh nothing
    matrix = rng.normal(size=(200, 8)).astype(np.float32)
    matrix[:, -1], matrix[64:70, -1], matrix[70:, -1] = 0, 3, -300
    hidden = rng.normal(size=(20_000, 8)).astype(np.float32)
    hidden[:, -1] = 1
    cold, last = np.full(20_000, 0.1), np.full(20_000, LAST)
    assert np.array(read(dense(matrix), hidden, cold, last).sample).max() < 70


@pytest.mark.parametrize(
    ("bits", "group", "mode", "dtype"),
    [(4, 32, "affine", mx.bfloat16), (4, 32, "mxfp4", mx.float32)],
)
def test_quantised_embeddings_are_read_as_their_dense_matrix(bits, group, mode, dtype):
    rng = np.random.default_rng(7)
    embedding = dense(rng.normal(size=(300, 64)) * 0.3)
    embedding.set_dtype(dtype)
    quantised = nn.QuantizedEmbedding.from_embedding(
        embedding, group_size=group, bits=bits, mode=mode
    )
    matrix = np.array(dequantize(quantised, mx.float32))
    assert matrix.shape == (300, 64)
    given = rng.normal(size=(90, 64)), np.full(90, 0.7), rng.random(90)
    ours, plain = read(quantised, *given), read(dense(matrix), *given)
    for mine, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(other), atol=1e-5)
    uniforms = given[2].astype(np.float32)
    check(ours, Exact.of(matrix, *given[:2]), matrix, uniforms)


@pytest.mark.parametrize(
    ("dtype", "size"), [(mx.float16, 3000.0), (mx.bfloat16, 1.0)], ids=str
)
def test_sixteen_bit_hidden_states_are_read_closely(dtype, size):
    """Also those whose logits, before the cap, a float16 could not hold."""
    rng = np.random.default_rng(8)
    embedding = dense(rng.normal(size=(300, 32)) * 0.3)
    embedding.set_dtype(dtype)
    hidden = mx.array(rng.normal(size=(90, 32)) * size).astype(dtype)
    temperature = mx.full((90,), 0.7)
    uniforms = mx.array(rng.random(90).astype(np.float32))
    stats = vocab.vocab_stats(embedding, hidden, temperature, uniforms, CAP)
    assert stats.signal.dtype == dtype and stats.entropy.dtype == mx.float32
    assert stats.argmax.dtype == stats.sample.dtype == mx.int32
    matrix = np.array(embedding.weight.astype(mx.float32))
    exact = Exact.of(matrix, np.array(hidden.astype(mx.float32)), np.array(temperature))
    np.testing.assert_allclose(np.array(stats.entropy), exact.entropy, atol=0.05)
    largest = np.abs(matrix).max() * np.sqrt(32)
    found = np.array(stats.signal.astype(mx.float32))
    np.testing.assert_allclose(found, exact.signal, atol=0.02 * largest)
    rows, best = np.arange(90), exact.p.max(axis=-1)
    assert (exact.p[rows, np.array(stats.argmax)] > 0.95 * best).all()
    assert beside(exact.p, np.array(uniforms), np.array(stats.sample)).max() < 0.02


def test_the_logits_of_all_positions_never_live_at_once(tuned):
    tuned(vocabulary_chunk=2048, vocabulary_rows=64)
    N, V, D = 256, 65_536, 16
    embedding = nn.Embedding(V, D)
    hidden = mx.random.normal((N, D), key=mx.random.key(0))
    given = mx.ones((N,)), mx.full((N,), 0.5)
    mx.eval(embedding.parameters(), hidden, given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(vocab.vocab_stats(embedding, hidden, *given, CAP))
    assert mx.get_peak_memory() - before < N * V * 4 / 2


@pytest.mark.parametrize(
    ("quantised", "temperature"), [(False, 0.7), (True, 0.7), (False, 50)]
)
def test_banned_tokens_have_no_part_in_anything(tuned, quantised, temperature):
    """As of a vocabulary without them, at the positions they are banned from."""
    tuned(vocabulary_rows=7)
    rng = np.random.default_rng(8)
    V, D, N, ids = 300, 64, 20, (3, 130, 299)
    matrix = rng.normal(size=(V, D)).astype(np.float32) * 0.3
    matrix[list(ids)] *= 3  # likely ones, one in each chunk
    at = rng.random(N) < 0.5
    hidden = rng.normal(size=(N, D)).astype(np.float32)
    uniforms = rng.random(N).astype(np.float32)
    temperatures = np.full(N, temperature, np.float32)
    embedding = dense(matrix)
    if quantised:
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, 64, 8)
        matrix = np.array(dequantize(embedding, mx.float32))
    banned = vocab.Banned(ids, mx.array(at))
    given = mx.array(hidden), mx.array(temperatures), mx.array(uniforms), CAP
    stats = vocab.vocab_stats(embedding, *given, banned)
    free = np.setdiff1d(np.arange(V), ids)
    for some, kept in ((at, free), (~at, np.arange(V))):
        part = matrix[kept]
        exact = Exact.of(part, hidden[some], temperatures[some])
        best = kept[exact.p.argmax(axis=-1)]
        np.testing.assert_array_equal(np.array(stats.argmax)[some], best)
        entropy = np.array(stats.entropy)[some]
        np.testing.assert_allclose(entropy, exact.entropy, atol=2e-4)
        found = np.array(stats.signal)[some]
        np.testing.assert_allclose(found, exact.signal, atol=2e-4)
    assert not np.isin(np.array(stats.sample)[at], ids).any()
    assert np.isin(np.array(stats.argmax)[~at], ids).any()
    for array in stats:
        assert np.isfinite(np.array(array)).all()
