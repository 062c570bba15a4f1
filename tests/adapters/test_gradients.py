"""Gradients of adapters, against differences of the function."""

import mlx.core as mx
import numpy as np
import pytest
from adapters.layers import beside, choices, linear, mixture, random


def check_gradient(of, at: dict[str, mx.array], eps: float = 0.02) -> None:
    """Compare with central differences of each array along random directions."""
    gradient = mx.grad(of)(at)
    for name, array in at.items():
        for seed in range(2):
            direction = random(*array.shape, seed=seed + 9)
            direction /= mx.linalg.norm(direction.reshape(-1))
            ahead = of(at | {name: array + eps * direction}).item()
            behind = of(at | {name: array - eps * direction}).item()
            measured = (ahead - behind) / (2 * eps)
            found = mx.sum(direction * gradient[name]).item()
            allowed = 4e-4 * mx.linalg.norm(gradient[name].reshape(-1)).item()
            assert found == pytest.approx(measured, rel=1e-2, abs=allowed), name
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
