"""Losses and gradients against transformers and torch autograd.

Same clean tokens, noise and self-conditioning decisions. transformers in float64 is
the truth, run row by row without padding; ours is float32, batched and padded. Routing
ties, where rounding sends a token elsewhere, are refused by the test itself.
"""

import inspect

import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import parameter_name
from mlx_dgemma.model.loading import load_model
from mlx_dgemma.training.batches import Batch
from mlx_dgemma.training.corruption import Sample
from mlx_dgemma.training.objective import losses

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ALLOWED = 1e-4  # relative, of the norm of each parameter's gradient
TIED = 1e-5
S, F = "sliding_attention", "full_attention"
# layers, heads, head sizes, experts, window, prefix lengths, canvas. Never one expert
# of many: the norm behind cancels its weight, whose gradient is rounding alone.
SHAPES = [
    ([S, S, F], (4, 2, 1), (16, 32), (4, 2), 8, (5, 11, 7), 16),
    ([S, F], (4, 4, 2), (8, 16), (8, 2), 3, (3, 1), 8),
    ([F], (2, 1, 1), (16, 16), (5, 2), 4, (9,), 5),
    ([S, F, S, F], (6, 3, 1), (8, 8), (3, 3), 16, (30, 40), 16),
    ([S, S, S, F], (4, 1, 4), (16, 32), (8, 8), 33, (20, 32, 33), 8),
    ([F, F], (8, 2, 2), (8, 24), (16, 4), 2, (4, 4), 12),
    ([S, F], (4, 2, 1), (32, 64), (4, 2), 5, (64, 6), 32),
    ([S, F], (2, 2, 1), (24, 48), (5, 2), 3, (2, 17), 7),
]


def samples_of(seed, prefixes, length, vocabulary):
    """No id 0: torch never trains the embedding of padding as an input, we do."""
    rng = np.random.default_rng(seed)
    samples = []
    for row, size in enumerate(prefixes):
        canvas = rng.integers(1, vocabulary, length)
        hit = rng.random(length) < rng.uniform(0.1, 1)
        noise = rng.integers(1, vocabulary, length)
        samples.append(
            Sample(
                prefix=rng.integers(1, vocabulary, size).tolist(),
                prompt=max(1, size // 2),
                canvas=canvas.tolist(),
                noisy=np.where(hit, noise, canvas).tolist(),
                self_conditioned=bool((row + seed) % 2),
            )
        )
    return samples


def truth(path, samples, mask_prompt):
    """Both losses and every gradient in float64, and the closest routing."""
    import torch
    from oracle import load_oracle
    from torch.nn.functional import cross_entropy
    from transformers import DynamicCache

    oracle = load_oracle(path, "float64")
    model, cap = oracle.model, oracle.model.final_logit_softcapping
    encoder, total = model.model.encoder, torch.zeros(2, dtype=torch.float64)
    # `past_key_values` became `cache` in transformers 5.24
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    with oracle.watch_routing() as gaps:
        for sample in samples:
            prefix, clean, noisy = (
                torch.tensor([list(ids)])
                for ids in (sample.prefix, sample.canvas, sample.noisy)
            )
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            before = encoder(input_ids=prefix, **{name: cache})
            given = {name: cache, "decoder_input_ids": noisy}
            with torch.no_grad():
                guess = model(**given).logits
            logits = model(
                **given,
                self_conditioning_logits=guess if sample.self_conditioned else None,
            ).logits
            denoising = cross_entropy(logits[0], clean[0])
            after = encoder(input_ids=clean, **{name: cache})
            states = [before.last_hidden_state, after.last_hidden_state]
            states = torch.cat(states, dim=1)[0, :-1]
            first = sample.prompt - 1 if mask_prompt else 0
            logits = cap * torch.tanh(model.lm_head(states[first:]) / cap)
            wanted = torch.cat([prefix, clean], dim=1)[0, 1:][first:]
            encoding = cross_entropy(logits, wanted)
            total = total + torch.stack([denoising, encoding]) / len(samples)
    total.sum().backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {
        parameter_name(name): weight.grad.numpy()
        for name, weight in named
        if parameter_name(name) is not None and weight.grad is not None
    }
    return total.detach().numpy(), gradients, min(map(np.min, gaps), default=1.0)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_losses_and_every_gradient(tmp_path, number):
    from make_tiny import make_checkpoint

    kinds, heads, dims, experts, window, prefixes, length = SHAPES[number]
    vocabulary = [32, 100, 257][number % 3]
    text = {
        "layer_types": kinds,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "num_global_key_value_heads": heads[2],
        "head_dim": dims[0],
        "global_head_dim": dims[1],
        "num_experts": experts[0],
        "top_k_experts": experts[1],
        "sliding_window": window,
        "vocab_size": vocabulary,
        "hidden_size": [64, 48][number % 2],
        "final_logit_softcapping": [30.0, 6.0][number % 2],
    }
    layout = ["release", "transformers"][number % 2]
    path = make_checkpoint(
        tmp_path / "m", seed=number, layout=layout, text=text, canvas_length=length
    )
    samples = samples_of(number, prefixes, length, vocabulary)
    mask_prompt = number % 3 == 1
    expected, theirs, gap = truth(path, samples, mask_prompt)
    assert gap > TIED, "a routing tie: choose another seed"

    model = load_model(path, read_config(path))
    batch = Batch.of(model.config, samples, mask_prompt=mask_prompt)
    for checkpoint in (False, True):

        def both(model, checkpoint=checkpoint):
            found = losses(model, batch, checkpoint=checkpoint)
            return found.denoising + found.encoding, found

        (_, found), gradients = nn.value_and_grad(model, both)(model)
        mine = dict(tree_flatten(gradients))
        found = [found.denoising.item(), found.encoding.item()]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        scalars = {name for name in mine if name.endswith("_scalar")}
        assert set(mine) - scalars == set(theirs)  # they are buffers there
        for name, right in theirs.items():
            wrong = np.linalg.norm(np.array(mine[name]) - right)
            assert wrong <= ALLOWED * max(np.linalg.norm(right), 1e-12), name
