"""Which device runs the model, and what follows from it. Nobody else asks."""

import mlx.core as mx


def name() -> str:
    """ "metal", "cuda" or "cpu": the device MLX computes on by default."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def loops_over_experts(dtype: mx.Dtype) -> bool:
    """Whether one product per expert beats, or must replace, the gathered product.

    MLX's CPU gather_mm knows float32 only, and runs one row at a time.
    """
    return name() == "cpu" and dtype != mx.float32


def peak_memory() -> int:
    """Most bytes MLX has held since the process began."""
    return mx.get_peak_memory()
