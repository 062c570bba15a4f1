"""Both losses have the gradient of every kind of adapter, beside quantised weights."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tiny import write_tiny

from mlx_dgemma import LoRA, convert, load
from mlx_dgemma.adapters.lora import TARGETS, adapt
from mlx_dgemma.training import objective
from mlx_dgemma.training.batches import Batch
from mlx_dgemma.training.corruption import Sample

Arrays = dict[str, mx.array]


def random(seed: int, shape: tuple[int, ...]) -> mx.array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return mx.array(values.astype(np.float32))


def sample(size: int, *, self_conditioned: bool = False) -> Sample:
    rng = np.random.default_rng(size)
    canvas, noise = rng.integers(5, 32, (2, 16))
    return Sample(
        prefix=rng.integers(5, 32, size).tolist(),
        prompt=size,
        canvas=canvas.tolist(),
        noisy=np.where(rng.random(16) < 0.5, noise, canvas).tolist(),
        self_conditioned=self_conditioned,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The losses of a batch as a function of all adapters, these, and the gradient.

    All experts are chosen: where the choice changes, a loss has no gradient. The guess
    is a constant, as the gradient takes it.
    """
    folder = tmp_path_factory.mktemp("smooth")
    write_tiny(folder / "dense", top_k_experts=4)
    convert(folder / "dense", folder / "q", quantize=True)
    model, _ = load(folder / "q")
    keys = tuple(key for keys in TARGETS.values() for key in keys)
    adapt(model, LoRA(rank=2, scale=1.5, keys=keys))
    at = {
        name: random(index, a.shape) * 0.5 / a.shape[-1] ** 0.5
        for index, (name, a) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    batch = Batch.of(model.config, [sample(3), sample(9, self_conditioned=True)])

    def of(arrays: Arrays) -> mx.array:
        model.update(tree_unflatten(list(arrays.items())))
        found = objective.losses(model, batch)
        return found.denoising + found.encoding

    guess = random(0, (2, 16, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective.loss, "signal", lambda *given: guess)
        gradient = mx.grad(of)(at)
        mx.eval(gradient)
        yield of, at, gradient


def length(tree: Arrays) -> float:
    return math.sqrt(sum(mx.sum(mx.square(a)).item() for a in tree.values()))


@pytest.mark.parametrize("target", TARGETS)
def test_losses_have_the_gradient_of_every_kind_of_adapter(trained, target):
    """Along the gradient and a random direction at once: along one that is random
    alone, a loss of thousands of weights barely moves."""
    of, at, gradient = trained
    for side in ("lora_a", "lora_b"):
        ends = tuple(f"{key}.{side}" for key in TARGETS[target])
        mine = {name: g for name, g in gradient.items() if name.endswith(ends)}
        assert len(mine) > 2 and all(mx.any(array).item() for array in mine.values())
        other = {name: random(9, a.shape) for name, a in mine.items()}
        sizes, values, eps = (length(mine), length(other)), [], 0.03
        way = {n: mine[n] / sizes[0] + other[n] / sizes[1] for n in mine}
        for step in (eps, -eps):
            moved = {name: at[name] + step * way[name] for name in way}
            values.append(of(at | moved).item())
        slope = sum(mx.sum(way[name] * mine[name]).item() for name in way)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=5e-3)
