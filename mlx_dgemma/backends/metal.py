"""Apple's GPUs.

Read from MLX's source and its release notes; nothing here was measured on a Mac yet.
"""

import mlx.core as mx

from . import gpu
from .interface import Backend, Choices, Limits, Mask, keep_float32, whole

WHY = gpu.WHY | {
    "product_rows": "its quantised products take any width",
    "fused_attention": "MLX itself prefers the unfused form at these head widths",
    "experts": "one row per pair, sorted, is what its gather kernels want",
}


class Metal(Backend):
    """The GPU of an Apple chip."""

    name = "metal"
    kind = mx.DeviceType.gpu
    why = WHY

    def __init__(self, choices: Choices = gpu.CHOICES):
        super().__init__(choices)

    def missing(self) -> str | None:
        if not mx.metal.is_available():
            return "this MLX has no Metal; it needs a Mac with Apple silicon, macOS 14"
        if mx.device_count(self.kind) == 0:
            return (
                "no Metal device is visible, as in a sandbox or a virtual machine; "
                "run outside of it, or on the CPU"
            )
        return None

    def prepare(self) -> None:
        """Not the wired limit: with it raised kernels panicked (mlx#3346)."""
        keep_float32()

    def limits(self) -> Limits:
        info = self.info()
        wired = whole(info, "max_recommended_working_set_size")
        return Limits(wired or whole(info, "memory_size"), wired=wired)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask
    ) -> mx.array:
        # to force it where there is no kernel is an error: few GPUs have one for 512
        if not self.choices.fused_attention or queries.shape[-1] > 256:
            return super().attend(queries, keys, values, mask)
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, mask=mask, force_fused=True
        )
