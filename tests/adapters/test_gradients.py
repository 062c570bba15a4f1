"""Gradients of adapters, against differences of the function."""

import math

import mlx.core as mx
import numpy as np
import pytest
from adapters.layers import beside, choices, fill, flat, linear, mixture, random
from mlx.utils import tree_unflatten
from tiny import write_tiny

from mlx_dgemma import load
from mlx_dgemma.adapters.lora import TARGETS, LoRA, adapt
from mlx_dgemma.checkpoint.convert import convert
from mlx_dgemma.training import objective
from mlx_dgemma.training.objective import Batch, Sample, losses

EVERY = tuple(key for keys in TARGETS.values() for key in keys)


def slope(of, at: dict[str, mx.array], direction: dict[str, mx.array], eps: float):
    """The central difference along a direction."""
    values = []
    for step in (eps, -eps):
        moved = {name: array + step * direction[name] for name, array in at.items()}
        values.append(of(moved).item())
    return (values[0] - values[1]) / (2 * eps)


def along(at: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    """A random direction of length 1."""
    found = {name: random(*a.shape, seed=seed + 9) for name, a in at.items()}
    return scaled(found, 1 / length(found))


def scaled(tree: dict[str, mx.array], factor: float) -> dict[str, mx.array]:
    return {name: array * factor for name, array in tree.items()}


def length(tree: dict[str, mx.array]) -> float:
    return math.sqrt(sum(mx.sum(mx.square(a)).item() for a in tree.values()))


def product(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    return sum(mx.sum(one[name] * other[name]).item() for name in one)


def check_gradient(of, at: dict[str, mx.array], eps: float = 0.02) -> None:
    """Of each array apart, along random directions."""
    gradient = mx.grad(of)(at)
    for name in at:
        for seed in range(2):
            own = {name: at[name]}
            direction = along(own, seed)
            found = product(direction, gradient)
            measured = slope(lambda moved: of(at | moved), own, direction, eps)
            allowed = 2e-3 * length({name: gradient[name]})
            assert found == pytest.approx(measured, rel=1e-2, abs=allowed / 5), name
            assert measured


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_gradients_pass_a_quantised_layer_and_reach_its_adapter(mode):
    found = beside(linear(mode)[0])
    given, weigh = random(6, 64, seed=5), random(6, 48, seed=8)

    def of(arrays):
        found.lora_a, found.lora_b = arrays["a"], arrays["b"]
        return mx.sum(mx.tanh(found(arrays["x"]) / 8) * weigh)

    check_gradient(of, {"a": found.lora_a, "b": found.lora_b, "x": given})


@pytest.mark.parametrize(
    ("mode", "way"), [("dense", "loop"), ("affine", "blocks"), ("mxfp4", "sorted")]
)
def test_gradients_reach_the_adapters_of_the_experts_that_were_chosen(
    experts_run, mode, way
):
    ours, _ = mixture(mode)
    x, indices, weights = choices(9)
    weigh = random(9, 64, seed=8)
    experts_run(way)
    parts = {"up": ours.gate_up_proj, "down": ours.down_proj}

    def of(arrays):
        for name, part in parts.items():
            part.lora_a, part.lora_b = arrays[name + ".a"], arrays[name + ".b"]
        return mx.sum(ours(arrays["x"], indices, arrays["weights"]) * weigh)

    at = {"x": x, "weights": weights}
    for name, part in parts.items():
        at |= {name + ".a": part.lora_a, name + ".b": part.lora_b}
    check_gradient(of, at)
    gradient = mx.grad(of)(at)
    for name in ("up.a", "up.b", "down.a", "down.b"):
        largest = np.abs(np.array(gradient[name])).max(axis=(1, 2))
        assert (largest > 0).tolist() == [True, True, True, False]  # the last is idle


def sample(size: int, *, conditioned: bool = False) -> Sample:
    rng = np.random.default_rng(size)
    canvas, noise = rng.integers(5, 32, (2, 16))
    return Sample(
        prefix=rng.integers(5, 32, size).tolist(),
        prompt=size,
        canvas=canvas.tolist(),
        noisy=np.where(rng.random(16) < 0.5, noise, canvas).tolist(),
        conditioned=conditioned,
    )


@pytest.fixture(scope="module", params=["affine", "mxfp4"])
def trained(request, tmp_path_factory):
    """A 4-bit model with every adapter, both losses of a batch, and their gradient.

    All experts are chosen: where the choice changes, a loss has no gradient. The guess
    is a constant, as the gradient takes it.
    """
    folder = tmp_path_factory.mktemp("smooth")
    write_tiny(folder / "dense", top_k_experts=4)
    convert(folder / "dense", folder / "q", quantize=True, q_mode=request.param)
    model = load(folder / "q")[0]
    adapt(model, LoRA(rank=2, scale=1.5, keys=EVERY))
    fill(model)
    batch = Batch.of(model.config, [sample(3), sample(9, conditioned=True)])

    def of(arrays):
        model.update(tree_unflatten(list(arrays.items())))
        found = losses(model, batch, encoding=True, again=False)
        return found.denoising + found.encoding

    guess = random(2, 16, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "_signal", lambda model, hidden: guess)
        at = flat(model.trainable_parameters())
        gradient = mx.grad(of)(at)
        mx.eval(gradient)
        yield of, at, gradient


@pytest.mark.slow
@pytest.mark.parametrize("side", ["lora_a", "lora_b"])
@pytest.mark.parametrize("target", TARGETS)
def test_both_losses_have_the_gradient_of_every_kind_of_adapter(trained, target, side):
    """Along the gradient and a random direction at once: along one that is random
    alone, a loss of thousands of weights barely moves."""
    of, at, gradient = trained
    ends = tuple(f"{key}.{side}" for key in TARGETS[target])
    own = {name: array for name, array in at.items() if name.endswith(ends)}
    mine = {name: gradient[name] for name in own}
    assert len(own) > 2 and all(mx.any(array).item() for array in mine.values())
    aligned, other = scaled(mine, 1 / length(mine)), along(own, 0)
    direction = {name: aligned[name] + other[name] for name in own}
    measured = slope(lambda moved: of(at | moved), own, direction, eps=0.03)
    assert product(direction, mine) == pytest.approx(measured, rel=5e-3)
