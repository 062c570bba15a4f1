"""What a training step sees, what it must not see, and its losses."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.training.batches import BUCKET, Batch
from mlx_dgemma.training.corruption import Sample
from mlx_dgemma.training.objective import losses
from mlx_dgemma.training.passes import AttentionInputs, denoise, encode

LENGTH, VOCABULARY = 16, 32


@pytest.fixture
def model(tiny_model):
    return tiny_model[0]


def sample(size, seed=0, *, prompt=None, self_conditioned=False):
    rng = np.random.default_rng([seed, size])
    canvas, noise = rng.integers(0, VOCABULARY, (2, LENGTH))
    return Sample(
        prefix=rng.integers(0, VOCABULARY, size).tolist(),
        prompt=size if prompt is None else prompt,
        canvas=canvas.tolist(),
        noisy=np.where(rng.random(LENGTH) < 0.5, noise, canvas).tolist(),
        self_conditioned=self_conditioned,
    )


def states(model, *samples):
    """Encoder states of a batch, and decoder states of its noisy canvases."""
    batch = Batch.of(model.config, samples)
    inputs = AttentionInputs.of(model.config, batch.starts, batch.tokens.shape[1])
    encoded, kv = encode(model, batch.tokens, inputs)
    decoded = denoise(model, batch.noisy, kv, inputs, batch.column, None)
    return np.array(encoded), np.array(decoded)


def test_decoder_sees_nothing_of_the_clean_canvas(model):
    """Other clean tokens, same prefix and noise: the same states, to the last bit."""
    samples = [sample(5), sample(40)]  # within the window and far beyond it
    others = [
        replace(one, canvas=[(t + 7) % VOCABULARY for t in one.canvas])
        for one in samples
    ]
    before, after = states(model, *samples), states(model, *others)
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_decoder_sees_every_column_of_the_prefix(model):
    one = sample(6)
    _, before = states(model, one)
    for column in range(6):
        prefix = list(one.prefix)
        prefix[column] = (prefix[column] + 1) % VOCABULARY
        _, after = states(model, replace(one, prefix=prefix))
        assert not np.array_equal(before, after), column


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_training_sees_what_generating_sees(model, size):
    """Padded among others, the states are those behind a prefix cache."""
    one = sample(size)
    encoded, decoded = states(model, one, sample(50))
    cache = model.make_cache()
    model.encode(mx.array([one.prefix], dtype=mx.int32), cache)
    noisy = mx.array([one.noisy], dtype=mx.int32)
    wanted = model.denoise_hidden(noisy, model.view(cache, LENGTH))
    np.testing.assert_allclose(decoded[:1], np.array(wanted), atol=2e-5)
    whole = mx.array([[*one.prefix, *one.canvas]], dtype=mx.int32)
    wanted = np.array(model.encode_hidden(whole, model.make_cache()))
    np.testing.assert_allclose(encoded[:1, -wanted.shape[1] :], wanted, atol=2e-5)


def test_prefixes_end_together_and_padding_weighs_nothing(model):
    """The losses of a batch are the means of its rows', each on its own."""
    samples = [sample(3), sample(BUCKET + 1), sample(9)]
    batch = Batch.of(model.config, samples)
    assert batch.column == 2 * BUCKET and batch.starts.tolist() == [61, 31, 55]
    row = batch.tokens[0].tolist()
    assert row == [0] * 61 + list(samples[0].prefix) + list(samples[0].canvas)
    alone = [losses(model, Batch.of(model.config, [one])) for one in samples]
    found, only = losses(model, batch), losses(model, batch, encoding=False)
    mean = np.mean([one.denoising.item() for one in alone])
    assert found.denoising.item() == pytest.approx(mean, rel=1e-5)
    mean = np.mean([one.encoding.item() for one in alone])
    assert found.encoding.item() == pytest.approx(mean, rel=1e-5)
    wanted = found.denoising.item(), 0.0
    assert (only.denoising.item(), only.encoding.item()) == pytest.approx(wanted)


def test_encoder_loss_is_that_of_each_next_token(model):
    """All pairs by default; with the prompt masked, from its last token on."""
    one = sample(11, prompt=4)
    whole = mx.array([[*one.prefix, *one.canvas]], dtype=mx.int32)
    logits = model.logits(model.encode_hidden(whole, model.make_cache()))
    nats = nn.losses.cross_entropy(logits[:, :-1], whole[:, 1:])
    for masked, first in ((False, 0), (True, 3)):
        batch = Batch.of(model.config, [one], mask_prompt=masked)
        wanted = mx.mean(nats[:, first:]).item()
        assert losses(model, batch).encoding.item() == pytest.approx(wanted, rel=1e-5)


def test_a_guess_is_seen_only_in_conditioned_samples(model):
    """A sample that is not self-conditioned loses the same beside one that is."""
    plain, other = sample(8), sample(8, seed=1, self_conditioned=True)

    def denoising(*samples):
        batch = Batch.of(model.config, samples)
        return losses(model, batch, encoding=False).denoising.item()

    mean = (denoising(plain) + denoising(other)) / 2
    assert denoising(plain, other) == pytest.approx(mean, rel=1e-5)
    unconditioned = denoising(replace(other, self_conditioned=False))
    assert abs(denoising(other) - unconditioned) > 1e-4


def test_conditioned_loss_is_that_of_a_second_step_at_temperature_one(model):
    one = sample(9, self_conditioned=True)
    cache = model.make_cache()
    model.encode(mx.array([one.prefix], dtype=mx.int32), cache)
    noisy = mx.array([one.noisy], dtype=mx.int32)
    signal = model.self_condition(model.denoise(noisy, cache))
    logits = model.denoise(noisy, cache, signal)
    wanted = nn.losses.cross_entropy(logits, mx.array([one.canvas]), reduction="mean")
    found = losses(model, Batch.of(model.config, [one])).denoising
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_checkpointed_layers_give_the_same_gradients_in_less_memory(model):
    batch = Batch.of(
        model.config, [sample(40, n, self_conditioned=True) for n in range(8)]
    )
    model.unfreeze()
    before = {name: np.array(a) for name, a in tree_flatten(model.parameters())}

    def gradients(checkpoint):
        def total(model):
            found = losses(model, batch, checkpoint=checkpoint)
            return found.denoising + found.encoding

        mx.clear_cache()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        value, tree = nn.value_and_grad(model, total)(model)
        mx.eval(value, tree)
        return value.item(), dict(tree_flatten(tree)), mx.get_peak_memory() - active

    value, plain, memory = gradients(False)
    again, tree, less = gradients(True)
    model.freeze()
    assert again == pytest.approx(value, rel=1e-6) and less < 0.7 * memory
    for name, array in plain.items():
        wanted = np.array(array)
        allowed = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(np.array(tree[name]), wanted, atol=allowed)
    for name, array in tree_flatten(model.parameters()):  # the model keeps its own
        np.testing.assert_array_equal(np.array(array), before[name])
