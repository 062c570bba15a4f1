"""The chips Apple put into Macs, M1 to M5, as published.

Memory sizes, bandwidth and GPU cores: Apple's specification pages. GPU clocks: macOS
`powermetrics`, as users reported it. Rates are derived, cores × operations per core and
cycle × clock: a core has 128 ALUs of one multiply-add each, which gives the 2.6 to 27.2
TFLOPS that Apple stated for M1 to M2 Ultra; from M5 on, 16-bit matrix products run on
an accelerator in each core, 1024 operations a cycle by a microbenchmark of the A19.
"""

import re
from dataclasses import dataclass

from ..errors import SettingsError

ALU_FLOPS, ACCELERATOR_FLOPS = 2 * 128, 1024  # per GPU core and cycle
WRITTEN = re.compile(
    r"(?:apple\s+)?(m\d+(?:\s+(?:pro|max|ultra))?)[\s,]+(\d+)\s*(?:gb)?", re.IGNORECASE
)


@dataclass(frozen=True)
class Chip:
    """One bin of a chip: GHz of its GPU, GB/s (10^9), sizes sold in GB (2^30)."""

    name: str
    clock: float
    gpu_cores: int
    bandwidth: float
    memory: tuple[int, ...]

    @property
    def tflops(self) -> float:
        """10^12 operations a second in 16-bit matrix products; derived, see above."""
        per_cycle = ACCELERATOR_FLOPS if self.name.startswith("M5") else ALU_FLOPS
        return self.gpu_cores * per_cycle * self.clock / 1000


# name: GHz, then a (GPU cores, GB/s, memory sizes) for each bin, the slower first
TABLE = {
    "M1": (1.278, (7, 68.25, (8, 16)), (8, 68.25, (8, 16))),
    "M1 Pro": (1.296, (14, 200, (16, 32)), (16, 200, (16, 32))),
    "M1 Max": (1.296, (24, 400, (32, 64)), (32, 400, (32, 64))),
    "M1 Ultra": (1.296, (48, 800, (64, 128)), (64, 800, (64, 128))),
    "M2": (1.398, (8, 100, (8, 16, 24)), (10, 100, (8, 16, 24))),
    "M2 Pro": (1.398, (16, 200, (16, 32)), (19, 200, (16, 32))),
    "M2 Max": (1.398, (30, 400, (32, 64)), (38, 400, (32, 64, 96))),
    "M2 Ultra": (1.398, (60, 800, (64, 128, 192)), (76, 800, (64, 128, 192))),
    "M3": (1.398, (8, 100, (8, 16, 24)), (10, 100, (8, 16, 24))),
    "M3 Pro": (1.398, (14, 150, (18, 36)), (18, 150, (18, 36))),
    "M3 Max": (1.398, (30, 300, (36, 96)), (40, 400, (48, 64, 128))),
    "M3 Ultra": (1.398, (60, 819, (96, 256)), (80, 819, (96, 256, 512))),
    "M4": (1.470, (8, 120, (16, 24)), (10, 120, (16, 24, 32))),
    "M4 Pro": (1.578, (16, 273, (24, 48, 64)), (20, 273, (24, 48, 64))),
    "M4 Max": (1.578, (32, 410, (36,)), (40, 546, (48, 64, 128))),
    "M5": (1.578, (8, 153, (16,)), (10, 153, (16, 24, 32))),
    "M5 Pro": (1.620, (16, 307, (24, 48)), (20, 307, (24, 48, 64))),
    "M5 Max": (1.620, (32, 460, (36,)), (40, 614, (48, 64, 128))),
    "M5 Ultra": (1.620, (64, 1200, (96, 256)), (80, 1200, (96, 256, 512))),
}
CHIPS = [Chip(name, clock, *b) for name, (clock, *bins) in TABLE.items() for b in bins]


def find(text: str) -> tuple[Chip, int]:
    """Return the chip and the memory in GB that a text such as "M4 Max 64GB" names.

    Memory decides the bin; where both have that much, the slower is taken. Raises
    SettingsError naming the known chips, or the memory sizes of the chip.
    """
    match = WRITTEN.fullmatch(text.strip())
    name = " ".join(match[1].split()).casefold() if match else ""
    bins = [chip for chip in CHIPS if chip.name.casefold() == name]
    if match is None or not bins:
        raise SettingsError(
            f"chip is {text!r}; write it like 'M4 Max 64GB', with one of "
            f"{', '.join(TABLE)}"
        )
    memory = int(match[2])
    for chip in bins:
        if memory in chip.memory:
            return chip, memory
    sizes = sorted({size for chip in bins for size in chip.memory})
    raise SettingsError(
        f"chip is {text!r}; {bins[0].name} is sold with {', '.join(map(str, sizes))} GB"
    )
