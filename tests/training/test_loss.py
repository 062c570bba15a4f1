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
SIZES = [5, 127, 128, 129, 300]  # of vocabularies: one chunk, whole ones, a rest
# hidden states whose logits are small, partly capped, all but flat against the cap
SCALES = [0.3, 5.0, 40.0]


@pytest.fixture(autouse=True)
def small_chunks(tuned):
    """Chunks of 128 tokens and tiles of 3 positions, so that there are several."""
    tuned(vocabulary_chunk=128, vocabulary_rows=3)


def dense(matrix: np.ndarray, dtype: mx.Dtype = mx.float32) -> nn.Embedding:
    embedding = nn.Embedding(1, 1)
    embedding.weight = mx.array(matrix.astype(np.float32)).astype(dtype)
    return embedding


def case(size: int, scale: float = 1.0, rows: int = 7, width: int = 48):
    """E, hidden states, targets from both ends, and what the gradients are of."""
    rng = np.random.default_rng(size)
    matrix = rng.normal(size=(size, width)).astype(np.float32) * 0.3
    hidden = rng.normal(size=(rows, width)).astype(np.float32) * scale
    targets = rng.integers(0, size, rows)
    targets[:2] = 0, size - 1
    given = rng.normal(size=rows).astype(np.float32)
    return matrix, hidden, mx.array(targets.astype(np.int32)), mx.array(given)


def plain_logits(table: mx.array, hidden: mx.array) -> mx.array:
    return CAP * mx.tanh(hidden @ table.T / CAP)


def plain_entropy(table: mx.array, hidden: mx.array, targets: mx.array) -> mx.array:
    x = plain_logits(table, hidden)
    wanted = mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(x, axis=-1) - wanted


def plain_signal(table: mx.array, hidden: mx.array) -> mx.array:
    p = mx.softmax(plain_logits(table, hidden), axis=-1)
    return p @ table * math.sqrt(hidden.shape[-1])


def entropy_of(embedding, hidden, targets, given) -> mx.array:
    """A number that weighs every position differently, some of them negatively."""
    return mx.sum(loss.cross_entropy(embedding, hidden, targets, CAP) * given)


def close(found: mx.array, expected: mx.array, allowed: float = 1e-5) -> None:
    """Within `allowed` of the largest."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    mine, other = (np.array(a.astype(mx.float32)) for a in (found, expected))
    assert np.isfinite(mine).all()
    np.testing.assert_allclose(mine, other, rtol=0, atol=allowed * np.abs(other).max())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_the_cross_entropy_is_the_formulas(size, scale):
    matrix, hidden, targets, _ = case(size, scale)
    found = loss.cross_entropy(dense(matrix), mx.array(hidden), targets, CAP)
    exact = CAP * np.tanh(hidden.astype(np.float64) @ matrix.T.astype(np.float64) / CAP)
    total = np.log(np.exp(exact).sum(axis=-1))
    expected = total - exact[np.arange(7), np.array(targets)]
    assert found.shape == (7,) and found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_its_gradients_are_the_formulas(size, scale):
    matrix, hidden, targets, given = case(size, scale)

    def ours(table, hidden):
        embedding = dense(matrix)
        embedding.weight = table
        return entropy_of(embedding, hidden, targets, given)

    def plain(table, hidden):
        return mx.sum(plain_entropy(table, hidden, targets) * given)

    at = mx.array(matrix), mx.array(hidden)
    value, (table, states) = mx.value_and_grad(ours, argnums=(0, 1))(*at)
    expected, (plain_table, plain_states) = mx.value_and_grad(plain, argnums=(0, 1))(
        *at
    )
    close(value, expected, 1e-4)
    close(table, plain_table, 1e-4)
    close(states, plain_states, 1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 100])
def test_tiles_of_positions_change_nothing(tuned, rows):
    matrix, hidden, targets, given = case(300, 5.0)
    embedding = dense(matrix)

    def both():
        def of(embedding, hidden):
            return entropy_of(embedding, hidden, targets, given)

        gradient = mx.grad(of, argnums=1)(embedding, mx.array(hidden))
        weights = nn.value_and_grad(embedding, of)(embedding, mx.array(hidden))[1]
        values = loss.cross_entropy(embedding, mx.array(hidden), targets, CAP)
        return values, gradient, weights["weight"]

    expected = both()
    tuned(vocabulary_rows=rows)
    for mine, other in zip(both(), expected, strict=True):
        close(mine, other)


def test_only_the_states_that_weigh_have_a_gradient():
    matrix, hidden, targets, _ = case(300)
    given = mx.array([0.0, 1, 0, 0, 1, 0, 0])

    def of(states):
        return entropy_of(dense(matrix), states, targets, given)

    gradient = np.array(mx.grad(of)(mx.array(hidden)))
    assert (np.abs(gradient).max(axis=1) > 0).tolist() == [
        g > 0 for g in given.tolist()
    ]


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 32, "affine"), (8, 64, "affine"), (3, 32, "affine"), (4, 32, "mxfp4")],
)
def test_quantised_embeddings_have_the_losses_of_their_dense_matrix(bits, group, mode):
    matrix, hidden, targets, given = case(300, 2.0, width=64)
    quantised = nn.QuantizedEmbedding.from_embedding(
        dense(matrix), group_size=group, bits=bits, mode=mode
    )
    table = dequantize(quantised, mx.float32)
    assert table.shape == matrix.shape and not mx.array_equal(table, mx.array(matrix))

    def ours(states):
        return entropy_of(quantised, states, targets, given)

    def plain(states):
        return mx.sum(plain_entropy(table, states, targets) * given)

    states = mx.array(hidden)
    value, gradient = mx.value_and_grad(ours)(states)
    expected, wanted = mx.value_and_grad(plain)(states)
    close(value, expected, 1e-4)
    close(gradient, wanted, 1e-4)
    guess = loss.signal(quantised, states, CAP)
    close(guess, plain_signal(table, states), 1e-4)
    blind = mx.grad(lambda h: mx.sum(mx.square(loss.signal(quantised, h, CAP))))
    assert not np.array(blind(states)).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [1.0, 20.0])
def test_sixteen_bit_states_keep_their_dtype_and_lose_little(dtype, size):
    """Losses stay float32, gradients are of the dtype of what they are for."""
    matrix, hidden, targets, given = case(300, size)
    embedding, states = dense(matrix, dtype), mx.array(hidden).astype(dtype)

    def ours(table, states):
        embedding.weight = table
        return entropy_of(embedding, states, targets, given)

    def plain(table, states):
        entropy = plain_entropy(table.astype(mx.float32), states, targets)
        return mx.sum(entropy * given)

    table = embedding.weight
    value, found = mx.value_and_grad(ours, argnums=(0, 1))(table, states)
    exact = states.astype(mx.float32)
    expected, wanted = mx.value_and_grad(plain, argnums=(0, 1))(table, exact)
    assert value.dtype == mx.float32
    close(value, expected, 0.02)
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other.astype(dtype), 0.02)
    guess = loss.signal(dense(matrix, dtype), states, CAP)
    close(guess, plain_signal(table.astype(mx.float32), exact).astype(dtype), 0.02)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e15])
def test_logits_far_beyond_the_cap_are_finite(size):
    """There tanh is flat: a loss of at most 2 · cap + log V, gradients of nothing."""
    matrix, hidden, targets, given = case(300)
    states = mx.array(hidden * size)
    values = np.array(loss.cross_entropy(dense(matrix), states, targets, CAP))
    exact = hidden.astype(np.float64) * size @ matrix.T.astype(np.float64)
    x = CAP * np.tanh(exact / CAP)
    expected = np.log(np.exp(x).sum(axis=-1)) - x[np.arange(7), np.array(targets)]
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert values.max() <= 2 * CAP + math.log(300) + 1e-3

    def of(table, states):
        embedding = dense(matrix)
        embedding.weight = table
        guess = mx.sum(loss.signal(embedding, states, CAP))
        return entropy_of(embedding, states, targets, given) + guess

    gradients = mx.grad(of, argnums=(0, 1))(mx.array(matrix), states)
    for gradient in gradients:
        assert np.isfinite(np.array(gradient)).all()


def test_a_certain_target_costs_nothing_and_an_impossible_one_the_whole_range():
    matrix = np.full((300, 1), -1000.0)
    matrix[200] = 1000.0
    found = loss.cross_entropy(dense(matrix), mx.ones((2, 1)), mx.array([200, 4]), CAP)
    np.testing.assert_allclose(np.array(found), [0, 2 * CAP], atol=1e-4)


@pytest.mark.parametrize("rising", [1, -1])
def test_highest_logits_may_come_in_any_chunk(rising):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(700, 16)).astype(np.float32)
    matrix[:, 0] = np.linspace(-9, 9, 700)[::rising]
    hidden = rng.normal(size=(6, 16)).astype(np.float32) * 0.2
    hidden[:, 0] = np.linspace(0, 3, 6)
    states, targets = mx.array(hidden), mx.array([0, 699, 350, 127, 128, 600])
    table = mx.array(matrix)
    found = loss.cross_entropy(dense(matrix), states, targets, CAP)
    close(found, plain_entropy(table, states, targets))
    close(loss.signal(dense(matrix), states, CAP), plain_signal(table, states), 1e-4)


def test_a_softcap_of_its_own_is_taken():
    matrix, hidden, targets, _ = case(129, 5.0)
    low = loss.cross_entropy(dense(matrix), mx.array(hidden), targets, 2.0)
    x = 2 * np.tanh(hidden @ matrix.T / 2)
    expected = np.log(np.exp(x).sum(axis=-1)) - x[np.arange(7), np.array(targets)]
    np.testing.assert_allclose(np.array(low), expected, rtol=1e-4)


# The signal


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_the_signal_is_the_formulas_and_only_e_has_a_gradient(size, scale):
    matrix, hidden, _, _ = case(size, scale)
    rng = np.random.default_rng(9)
    given = mx.array(rng.normal(size=(7, 48)).astype(np.float32))
    states = mx.array(hidden)

    def ours(table, states):
        embedding = dense(matrix)
        embedding.weight = table
        return mx.sum(loss.signal(embedding, states, CAP) * given)

    def plain(table, states):
        p = mx.stop_gradient(mx.softmax(plain_logits(table, states), axis=-1))
        return mx.sum(p @ table * given) * math.sqrt(48)

    table = mx.array(matrix)
    close(loss.signal(dense(matrix), states, CAP), plain_signal(table, states), 1e-4)
    found, blind = mx.grad(ours, argnums=(0, 1))(table, states)
    close(found, mx.grad(plain)(table, states), 1e-4)
    assert not np.array(blind).any()


def test_the_signal_is_what_the_next_step_of_generating_reads():
    """As `vocab.vocab_stats` gives it at temperature 1."""
    matrix, hidden, _, _ = case(300, 3.0)
    states = mx.array(hidden)
    reading = vocab.vocab_stats(
        dense(matrix), states, mx.ones((7,)), mx.zeros((7,)), CAP
    )
    close(loss.signal(dense(matrix), states, CAP), reading.signal)


def test_gradients_of_loss_and_signal_add_up_in_e():
    """As in a conditioned step: both read the same matrix."""
    matrix, hidden, targets, given = case(129)
    states = mx.array(hidden)

    def ours(table):
        embedding = dense(matrix)
        embedding.weight = table
        seen = states + 0.01 * loss.signal(embedding, states, CAP)
        return entropy_of(embedding, seen, targets, given)

    def plain(table):
        p = mx.stop_gradient(mx.softmax(plain_logits(table, states), axis=-1))
        seen = states + 0.01 * math.sqrt(48) * (p @ table)
        return mx.sum(plain_entropy(table, seen, targets) * given)

    close(mx.grad(ours)(mx.array(matrix)), mx.grad(plain)(mx.array(matrix)), 1e-4)


# Memory


def entropy(embedding: nn.Module, hidden: mx.array) -> mx.array:
    return mx.sum(loss.cross_entropy(embedding, hidden, mx.arange(len(hidden)), CAP))


def guess(embedding: nn.Module, hidden: mx.array) -> mx.array:
    return mx.sum(loss.signal(embedding, hidden, CAP))


@pytest.mark.parametrize(
    ("quantised", "of"), [(False, entropy), (True, entropy), (False, guess)]
)
def test_the_logits_of_all_positions_never_live_at_once(tuned, quantised, of):
    """Neither for the values nor for the gradients of the states and of E."""
    tuned(vocabulary_chunk=512, vocabulary_rows=128)
    N, V, D = 256, 32_768, 8
    embedding = nn.Embedding(V, D)
    if quantised:
        embedding = nn.QuantizedEmbedding.from_embedding(nn.Embedding(V, 32), 32, 4)
    hidden = mx.random.normal((N, 32 if quantised else D), key=mx.random.key(0))
    mx.eval(embedding.parameters(), hidden)
    step = mx.value_and_grad(lambda hidden: of(embedding, hidden))
    if not quantised:
        step = nn.value_and_grad(embedding, lambda hidden: of(embedding, hidden))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(hidden))
    # a third, and most of that are gradients of E, one for each of the tiles
    assert mx.get_peak_memory() - before < N * V * 4 / 3
