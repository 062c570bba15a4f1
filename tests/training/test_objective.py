"""What a training step sees, and what it must not see."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.training import objective
from mlx_dgemma.training.objective import BUCKET, Batch, Sample, losses
from mlx_dgemma.training.passes import denoise, encode

LENGTH, VOCABULARY = 16, 32


def sample(size, seed=0, *, prompt=None, conditioned=False):
    rng = np.random.default_rng([seed, size])
    canvas = rng.integers(0, VOCABULARY, LENGTH)
    noise = rng.integers(0, VOCABULARY, LENGTH)
    return Sample(
        prefix=rng.integers(0, VOCABULARY, size).tolist(),
        prompt=size if prompt is None else prompt,
        canvas=canvas.tolist(),
        noisy=np.where(rng.random(LENGTH) < 0.5, noise, canvas).tolist(),
        conditioned=conditioned,
    )


def states(model, batch, *, signal=None):
    """What the decoder makes of a batch's noisy canvases."""
    _, kept = encode(model, batch.tokens, batch.sight, again=False)
    given = batch.noisy, kept, batch.sight, batch.column, signal
    return np.array(denoise(model, *given, again=False))


def test_the_decoder_sees_nothing_of_the_clean_canvas(tiny_model):
    """Other clean tokens, same prefix and noise: the same states, to the last bit."""
    model, _ = tiny_model
    samples = [sample(5), sample(40)]  # within the window and far beyond it
    others = [
        replace(one, canvas=[(token + 7) % VOCABULARY for token in one.canvas])
        for one in samples
    ]
    before = Batch.of(model.config, samples)
    after = Batch.of(model.config, others)
    assert not mx.array_equal(before.tokens, after.tokens)
    np.testing.assert_array_equal(states(model, before), states(model, after))


def test_the_loss_of_the_whole_step_leaks_nothing(tiny_model, monkeypatch):
    """The same through `losses`, self-conditioned, where the targets do change."""
    model, _ = tiny_model
    seen = []
    plain = objective._cross_entropy

    def watch(model, hidden, targets):
        seen.append((np.array(hidden), np.array(targets)))
        return plain(model, hidden, targets)

    monkeypatch.setattr(objective, "_cross_entropy", watch)
    one = sample(21, conditioned=True)
    other = replace(one, canvas=one.canvas[::-1])
    for each in (one, other):
        losses(model, Batch.of(model.config, [each]), encoding=True, again=False)
    (first, targets), _, (second, changed), _ = seen
    assert (targets != changed).any()
    np.testing.assert_array_equal(first, second)


def test_the_decoder_sees_every_column_of_the_prefix(tiny_model):
    model, _ = tiny_model
    one = sample(6)
    changed = states(model, Batch.of(model.config, [one]))
    for column in range(6):
        prefix = list(one.prefix)
        prefix[column] = (prefix[column] + 1) % VOCABULARY
        other = states(model, Batch.of(model.config, [replace(one, prefix=prefix)]))
        assert not np.array_equal(changed, other), column


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_training_sees_what_generating_sees(tiny_model, size):
    """Padded among others, the states are those of `denoise_hidden` behind a cache."""
    model, _ = tiny_model
    one, longest = sample(size), sample(50)
    batch = Batch.of(model.config, [one, longest])
    cache = model.make_cache()
    model.encode(mx.array([one.prefix], dtype=mx.int32), cache)
    noisy = mx.array([one.noisy], dtype=mx.int32)
    wanted = np.array(model.denoise_hidden(noisy, model.view(cache, LENGTH)))
    np.testing.assert_allclose(states(model, batch)[:1], wanted, atol=2e-5)


def test_the_encoder_states_are_those_of_encode_hidden(tiny_model):
    model, _ = tiny_model
    one, longest = sample(11), sample(50)
    batch = Batch.of(model.config, [one, longest])
    found, _ = encode(model, batch.tokens, batch.sight, again=False)
    whole = mx.array([[*one.prefix, *one.canvas]], dtype=mx.int32)
    wanted = np.array(model.encode_hidden(whole, model.make_cache()))
    np.testing.assert_allclose(np.array(found)[:1, -27:], wanted, atol=2e-5)


def test_prefixes_end_together_in_a_bucket(tiny_model):
    model, _ = tiny_model
    batch = Batch.of(model.config, [sample(3), sample(BUCKET + 1)])
    assert batch.column == 2 * BUCKET
    assert batch.tokens.shape == (2, 2 * BUCKET + LENGTH)
    row = np.array(batch.tokens)[0]
    assert (row[: batch.column - 3] == 0).all()
    assert row[batch.column - 3 : batch.column].tolist() == list(sample(3).prefix)
    assert row[batch.column :].tolist() == list(sample(3).canvas)


def test_every_example_weighs_the_same_and_pads_nothing(tiny_model):
    """The encoder's loss of a batch is the mean of its rows', each on its own."""
    model, _ = tiny_model
    samples = [sample(3), sample(30), sample(9)]
    whole = losses(model, Batch.of(model.config, samples), encoding=True, again=False)
    alone = [
        losses(model, Batch.of(model.config, [one]), encoding=True, again=False)
        for one in samples
    ]
    for part in ("denoising", "encoding"):
        mean = np.mean([vars(one)[part].item() for one in alone])
        assert vars(whole)[part].item() == pytest.approx(mean, rel=1e-5)


def test_the_encoder_loss_scores_the_pair_into_the_answer(tiny_model):
    """All pairs by default; with the prompt masked, from its last token on."""
    model, _ = tiny_model
    one = sample(10, prompt=4)
    everything = Batch.of(model.config, [one])
    masked = Batch.of(model.config, [one], mask_prompt=True)
    start = everything.column - 10
    for batch, first in ((everything, start), (masked, start + 3)):
        weights = np.array(batch.weights)[0]
        assert (weights[:first] == 0).all() and (weights[first:] > 0).all()
        assert weights.sum() == pytest.approx(1)


def test_a_guess_is_seen_only_where_the_coin_says_so(tiny_model):
    """A sample that is not conditioned loses the same beside one that is."""
    model, _ = tiny_model
    plain, other = sample(8), sample(8, seed=1, conditioned=True)

    def denoising(samples):
        batch = Batch.of(model.config, samples)
        found = losses(model, batch, encoding=False, again=False)
        return found.denoising.item()

    both = denoising([plain, other])
    assert both == pytest.approx(
        (denoising([plain]) + denoising([other])) / 2, rel=1e-5
    )
    unconditioned = denoising([replace(other, conditioned=False)])
    assert abs(denoising([other]) - unconditioned) > 1e-4


def test_the_signal_is_that_of_generating_at_temperature_one(tiny_model):
    model, _ = tiny_model
    hidden = mx.random.normal((1, LENGTH, 64), key=mx.random.key(0))
    wanted = model.self_condition(model.logits(hidden))
    found = objective._signal(model, hidden)
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-4)


def test_without_the_encoder_loss_its_canvas_is_never_read(tiny_model, monkeypatch):
    model, _ = tiny_model
    read = []
    plain = objective.encode

    def watch(model, tokens, sight, *, again):
        read.append(tokens.shape[1])
        return plain(model, tokens, sight, again=again)

    monkeypatch.setattr(objective, "encode", watch)
    batch = Batch.of(model.config, [sample(9, conditioned=True)])
    found = [
        losses(model, batch, encoding=encoding, again=False).denoising.item()
        for encoding in (True, False)
    ]
    assert read == [batch.column + LENGTH, batch.column]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_layers_run_again_give_the_same_gradients_in_less_memory(tiny_model):
    model, _ = tiny_model
    batch = Batch.of(model.config, [sample(40, n, conditioned=True) for n in range(8)])
    model.unfreeze()

    def gradients(again):
        def total(model):
            found = losses(model, batch, encoding=True, again=again)
            return found.denoising + found.encoding

        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        value, tree = nn.value_and_grad(model, total)(model)
        mx.eval(value, tree)
        return value.item(), dict(tree_flatten(tree)), mx.get_peak_memory() - held

    value, plain, memory = gradients(False)
    again, tree, less = gradients(True)
    model.freeze()
    assert again == pytest.approx(value, rel=1e-6)
    for name, array in plain.items():
        wanted = np.array(array)
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(np.array(tree[name]), wanted, atol=1e-5 * largest)
    assert less < 0.7 * memory


def test_the_weights_of_the_model_survive_its_gradients(tiny_model):
    """Layers run again get their weights as arguments; the model keeps its own."""
    model, _ = tiny_model
    model.unfreeze()
    before = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
    batch = Batch.of(model.config, [sample(9)])

    def total(model):
        return losses(model, batch, encoding=True, again=True).denoising

    mx.eval(nn.value_and_grad(model, total)(model))
    model.freeze()
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(array), before[name])


def test_the_encoder_loss_is_that_of_each_next_token(tiny_model):
    model, _ = tiny_model
    one = sample(11)
    whole = mx.array([[*one.prefix, *one.canvas]], dtype=mx.int32)
    logits = model.logits(model.encode_hidden(whole, model.make_cache()))
    wanted = nn.losses.cross_entropy(logits[:, :-1], whole[:, 1:], reduction="mean")
    batch = Batch.of(model.config, [one])
    found = losses(model, batch, encoding=True, again=False)
    assert found.encoding.item() == pytest.approx(wanted.item(), rel=1e-5)
