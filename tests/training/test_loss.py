"""Losses against their plain formulas, with all logits at once; and their memory."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dgemma.model import vocab
from mlx_dgemma.model.layers import dequantize
from mlx_dgemma.training import loss

CAP = 30.0
# vocabularies: one chunk, whole ones, a rest; and hidden states whose logits are small,
# partly capped, almost flat against the cap
CASES = [(5, 0.3), (128, 40.0), (129, 5.0), (300, 40.0)]


@pytest.fixture(autouse=True)
def small_chunks(tuned):
    """Chunks of 128 tokens and tiles of 3 positions, so that there are several."""
    tuned(vocabulary_chunk=128, vocabulary_rows=3)


def embedding_of(table: mx.array) -> nn.Embedding:
    embedding = nn.Embedding(1, 1)
    embedding.weight = table
    return embedding


def case(size: int, scale: float = 1.0, width: int = 48):
    """E, hidden states, targets from both ends, and what the gradients are of."""
    rng = np.random.default_rng(size)
    table = rng.normal(size=(size, width)) * 0.3
    hidden = rng.normal(size=(7, width)) * scale
    targets = rng.integers(0, size, 7)
    targets[:2] = 0, size - 1
    given = rng.normal(size=7)
    floats = (mx.array(a.astype(np.float32)) for a in (table, hidden, given))
    table, hidden, given = floats
    return table, hidden, mx.array(targets.astype(np.int32)), given


def plain_logits(table: mx.array, hidden: mx.array, cap: float = CAP) -> mx.array:
    return cap * mx.tanh(hidden @ table.T / cap)


def plain_entropy(table: mx.array, hidden: mx.array, targets, cap=CAP) -> mx.array:
    x = plain_logits(table, hidden, cap)
    wanted = mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(x, axis=-1) - wanted


def plain_signal(table: mx.array, hidden: mx.array) -> mx.array:
    p = mx.stop_gradient(mx.softmax(plain_logits(table, hidden), axis=-1))
    return p @ table * math.sqrt(hidden.shape[-1])


def close(found: mx.array, expected: mx.array, allowed: float = 1e-4) -> None:
    """Within `allowed` of the largest."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    mine, other = (np.array(a.astype(mx.float32)) for a in (found, expected))
    assert np.isfinite(mine).all()
    np.testing.assert_allclose(mine, other, rtol=0, atol=allowed * np.abs(other).max())


def entropy_of(function, targets, given):
    """Value and gradients of E and hidden states of a weighted sum of entropies."""

    def of(table, hidden):
        found = function(embedding_of(table), hidden, targets, CAP)
        return mx.sum(found * given)

    return mx.value_and_grad(of, argnums=(0, 1))


def plain(embedding: nn.Embedding, hidden: mx.array, targets, cap) -> mx.array:
    return plain_entropy(embedding.weight, hidden, targets, cap)


@pytest.mark.parametrize(("size", "scale"), CASES)
def test_cross_entropy_and_its_gradients_are_the_formulas(size, scale):
    table, hidden, targets, given = case(size, scale)
    exact = np.array(hidden, np.float64) @ np.array(table, np.float64).T
    exact = CAP * np.tanh(exact / CAP)
    expected = np.log(np.exp(exact).sum(axis=-1))
    expected -= exact[np.arange(7), np.array(targets)]
    found = loss.cross_entropy(embedding_of(table), hidden, targets, CAP)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=2e-5)
    _, mine = entropy_of(loss.cross_entropy, targets, given)(table, hidden)
    _, wanted = entropy_of(plain, targets, given)(table, hidden)
    for one, other in zip(mine, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize(("size", "scale"), CASES)
def test_signal_is_the_formula_and_only_e_has_a_gradient(size, scale):
    table, hidden, _, _ = case(size, scale)
    given = mx.random.normal((7, 48), key=mx.random.key(9))
    found = loss.signal(embedding_of(table), hidden, CAP)
    close(found, plain_signal(table, hidden))

    def ours(table, hidden):
        return mx.sum(loss.signal(embedding_of(table), hidden, CAP) * given)

    gradient, none = mx.grad(ours, argnums=(0, 1))(table, hidden)
    close(gradient, mx.grad(lambda t: mx.sum(plain_signal(t, hidden) * given))(table))
    assert not np.array(none).any()


@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(4, 32, "affine"), (3, 32, "affine"), (4, 32, "mxfp4")]
)
def test_quantised_embeddings_have_the_losses_of_their_dense_matrix(bits, group, mode):
    matrix, hidden, targets, given = case(300, 2.0, width=64)
    quantised = nn.QuantizedEmbedding.from_embedding(
        embedding_of(matrix), group_size=group, bits=bits, mode=mode
    )
    table = dequantize(quantised, mx.float32)
    assert not mx.array_equal(table, matrix)
    functions = (
        lambda h: mx.sum(loss.cross_entropy(quantised, h, targets, CAP) * given),
        lambda h: mx.sum(plain_entropy(table, h, targets) * given),
    )
    (value, gradient), (expected, wanted) = (
        mx.value_and_grad(function)(hidden) for function in functions
    )
    close(value, expected)
    close(gradient, wanted)
    close(loss.signal(quantised, hidden, CAP), plain_signal(table, hidden))
    none = mx.grad(lambda h: mx.sum(mx.square(loss.signal(quantised, h, CAP))))
    assert not np.array(none(hidden)).any()


def test_sixteen_bit_states_keep_their_dtype_and_lose_little():
    """Losses stay float32; gradients have the dtype of what they are for."""
    exact, hidden, targets, given = case(300, 20.0)
    dtype = mx.bfloat16
    table, hidden = exact.astype(dtype), hidden.astype(dtype)
    value, found = entropy_of(loss.cross_entropy, targets, given)(table, hidden)
    exact = table.astype(mx.float32), hidden.astype(mx.float32)
    expected, wanted = entropy_of(plain, targets, given)(*exact)
    assert value.dtype == mx.float32
    close(value, expected, 0.02)
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other.astype(dtype), 0.02)
    signal = loss.signal(embedding_of(table), hidden, CAP)
    close(signal, plain_signal(*exact).astype(dtype), 0.02)


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_logits_far_beyond_the_cap_are_finite(size):
    """There tanh is flat: a loss of at most 2 · cap + log V, and small gradients."""
    table, hidden, targets, given = case(300)
    hidden = hidden * size
    found = loss.cross_entropy(embedding_of(table), hidden, targets, CAP)
    close(found, plain_entropy(table, hidden, targets))
    assert mx.max(found).item() <= 2 * CAP + math.log(300) + 1e-3
    _, gradients = entropy_of(loss.cross_entropy, targets, given)(table, hidden)
    assert all(np.isfinite(np.array(gradient)).all() for gradient in gradients)


def test_signal_is_what_the_next_step_of_generating_reads():
    """As `vocab.vocab_stats` gives it at temperature 1."""
    table, hidden, _, _ = case(300, 3.0)
    embedding = embedding_of(table)
    reading = vocab.vocab_stats(embedding, hidden, mx.ones((7,)), mx.zeros((7,)), CAP)
    close(loss.signal(embedding, hidden, CAP), reading.signal, 1e-5)


@pytest.mark.parametrize("part", ["dense", "quantised", "signal"])
def test_logits_of_all_positions_never_live_at_once(tuned, part):
    """Neither for the values nor for the gradients of the states and of E."""
    tuned(vocabulary_chunk=512, vocabulary_rows=64)
    N, V, D = 128, 32_768, 32 if part == "quantised" else 8
    embedding = nn.Embedding(V, D)
    hidden, targets = mx.random.normal((N, D), key=mx.random.key(0)), mx.arange(N)

    def of(hidden):
        if part == "signal":
            return mx.sum(loss.signal(embedding, hidden, CAP))
        return mx.sum(loss.cross_entropy(embedding, hidden, targets, CAP))

    step = nn.value_and_grad(embedding, of)
    if part == "quantised":
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, 32, 4)
        step = mx.value_and_grad(of)
    mx.eval(embedding.parameters(), hidden)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(hidden))
    # a half, and most of that are gradients of E, one for each of the tiles
    assert mx.get_peak_memory() - before < N * V * 4 / 2
