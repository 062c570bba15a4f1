"""Apple's GPUs. Nothing here was measured on a Mac yet."""

from dataclasses import dataclass

import mlx.core as mx

from .base import Backend


@dataclass(eq=False)
class Metal(Backend):
    """The GPU of an Apple chip.

    It leaves the wired limit alone: with it raised, kernels panicked (mlx#3346).
    """

    name = "metal"

    def missing(self) -> str | None:
        if not mx.metal.is_available():
            return "this MLX has no Metal; it needs a Mac with Apple silicon, macOS 14"
        if mx.device_count(self.kind) == 0:
            where = "as in a sandbox or a virtual machine; run outside of it"
            return f"no Metal device is visible, {where}, or on the CPU"
        return None

    def memory(self) -> int | None:
        return self.info_number("max_recommended_working_set_size", "memory_size")
