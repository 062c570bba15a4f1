"""The chips Apple put into Macs, M1 to M5, as published.

Memory sizes, bandwidth and GPU cores: Apple's technical specification pages. GPU
clocks, which Apple does not publish: macOS `powermetrics`, as users reported it.
Rates are derived: cores × operations per core and cycle × clock. Before M5 a core
has 128 ALUs of one multiply-add each, for 16 and 32 bits alike, which gives the 2.6
to 27.2 TFLOPS that Apple stated for M1 to M2 Ultra. From M5 on, 16-bit matrix
products run on an accelerator in each core, 1024 operations a cycle by a public
microbenchmark of the A19, which has the same one (Apple: "over 4x" M4). A public
PyTorch benchmark reached 14.1 TFLOPS on M5, of the 16.2 this gives for its 10 cores.
"""

import re
from dataclasses import dataclass

from ..errors import SettingsError

ALU_FLOPS = 2 * 128  # per GPU core and cycle
ACCELERATOR_FLOPS = 1024
WRITTEN = re.compile(
    r"(?:apple\s+)?(m\d+(?:\s+(?:pro|max|ultra))?)[\s,]+(\d+)\s*(?:gb)?", re.IGNORECASE
)
EXAMPLE = "M4 Max 64GB"


@dataclass(frozen=True)
class Chip:
    """One bin of a chip.

    bandwidth      of memory, GB/s (10^9)
    clock          of the GPU at its highest, GHz
    memory         sizes sold with it, GB (2^30)
    matrix_flops   16-bit operations of a GPU core per cycle in matrix products
    """

    name: str
    gpu_cores: int
    clock: float
    bandwidth: float
    memory: tuple[int, ...]
    matrix_flops: int = ALU_FLOPS

    @property
    def tflops(self) -> float:
        """10^12 operations a second, 16-bit matrix products; derived, see above."""
        return self.gpu_cores * self.matrix_flops * self.clock / 1000

    @property
    def tflops_fp32(self) -> float:
        """10^12 operations a second in float32, on the ALUs."""
        return self.gpu_cores * ALU_FLOPS * self.clock / 1000


# Bins of one name stand together, the slower first.
CHIPS = (
    Chip("M1", 7, 1.278, 68.25, (8, 16)),
    Chip("M1", 8, 1.278, 68.25, (8, 16)),
    Chip("M1 Pro", 14, 1.296, 200, (16, 32)),
    Chip("M1 Pro", 16, 1.296, 200, (16, 32)),
    Chip("M1 Max", 24, 1.296, 400, (32, 64)),
    Chip("M1 Max", 32, 1.296, 400, (32, 64)),
    Chip("M1 Ultra", 48, 1.296, 800, (64, 128)),
    Chip("M1 Ultra", 64, 1.296, 800, (64, 128)),
    Chip("M2", 8, 1.398, 100, (8, 16, 24)),
    Chip("M2", 10, 1.398, 100, (8, 16, 24)),
    Chip("M2 Pro", 16, 1.398, 200, (16, 32)),
    Chip("M2 Pro", 19, 1.398, 200, (16, 32)),
    Chip("M2 Max", 30, 1.398, 400, (32, 64)),
    Chip("M2 Max", 38, 1.398, 400, (32, 64, 96)),
    Chip("M2 Ultra", 60, 1.398, 800, (64, 128, 192)),
    Chip("M2 Ultra", 76, 1.398, 800, (64, 128, 192)),
    Chip("M3", 8, 1.398, 100, (8, 16, 24)),
    Chip("M3", 10, 1.398, 100, (8, 16, 24)),
    Chip("M3 Pro", 14, 1.398, 150, (18, 36)),
    Chip("M3 Pro", 18, 1.398, 150, (18, 36)),
    Chip("M3 Max", 30, 1.398, 300, (36, 96)),
    Chip("M3 Max", 40, 1.398, 400, (48, 64, 128)),
    Chip("M3 Ultra", 60, 1.398, 819, (96, 256)),
    Chip("M3 Ultra", 80, 1.398, 819, (96, 256, 512)),
    Chip("M4", 8, 1.470, 120, (16, 24)),
    Chip("M4", 10, 1.470, 120, (16, 24, 32)),
    Chip("M4 Pro", 16, 1.578, 273, (24, 48, 64)),
    Chip("M4 Pro", 20, 1.578, 273, (24, 48, 64)),
    Chip("M4 Max", 32, 1.578, 410, (36,)),
    Chip("M4 Max", 40, 1.578, 546, (48, 64, 128)),
    Chip("M5", 8, 1.578, 153, (16,), ACCELERATOR_FLOPS),
    Chip("M5", 10, 1.578, 153, (16, 24, 32), ACCELERATOR_FLOPS),
    Chip("M5 Pro", 16, 1.620, 307, (24, 48), ACCELERATOR_FLOPS),
    Chip("M5 Pro", 20, 1.620, 307, (24, 48, 64), ACCELERATOR_FLOPS),
    Chip("M5 Max", 32, 1.620, 460, (36,), ACCELERATOR_FLOPS),
    Chip("M5 Max", 40, 1.620, 614, (48, 64, 128), ACCELERATOR_FLOPS),
    Chip("M5 Ultra", 64, 1.620, 1200, (96, 256), ACCELERATOR_FLOPS),
    Chip("M5 Ultra", 80, 1.620, 1200, (96, 256, 512), ACCELERATOR_FLOPS),
)


def find(written: str) -> tuple[Chip, int]:
    """The chip and the memory in GB that a text such as "M4 Max 64GB" names.

    Where Apple sells a memory size with one bin only, it decides the bin; where with
    two, the slower is taken. Raises SettingsError naming the known chips, or the
    memory sizes of the chip named.
    """
    match = WRITTEN.fullmatch(written.strip())
    name = " ".join(match[1].split()).casefold() if match else ""
    bins = [chip for chip in CHIPS if chip.name.casefold() == name]
    if match is None or not bins:
        known = ", ".join(dict.fromkeys(chip.name for chip in CHIPS))
        raise SettingsError(
            f"chip is {written!r}; write it like {EXAMPLE!r}, with one of {known}"
        )
    memory = int(match[2])
    for chip in bins:
        if memory in chip.memory:
            return chip, memory
    sizes = sorted({size for chip in bins for size in chip.memory})
    raise SettingsError(
        f"chip is {written!r}; {bins[0].name} is sold with "
        f"{', '.join(map(str, sizes))} GB"
    )
