"""Apple's chips: what is listed, and how a name finds it."""

from itertools import pairwise

import pytest

from mlx_dgemma.errors import SettingsError
from mlx_dgemma.performance.chips import CHIPS, find

# TFLOPS of the larger bin in Apple's press releases.
STATED = {"M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 21}
STATED |= {"M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.6, "M2 Ultra": 27.2}
LARGEST = {chip.name: chip for chip in CHIPS}


def test_derived_rates_are_those_apple_stated():
    for name, tflops in STATED.items():
        assert LARGEST[name].tflops == pytest.approx(tflops, rel=0.025)
    for before, after in (("M4", "M5"), ("M4 Max", "M5 Max")):
        # "over 4x" with the accelerators of M5
        assert 4 < LARGEST[after].tflops / LARGEST[before].tflops < 4.5


def test_memory_decides_the_bin():
    assert len(LARGEST) == 19
    for first, second in pairwise(CHIPS):
        if first.name == second.name:  # the slower bin stands first
            assert first.gpu_cores < second.gpu_cores
            assert first.bandwidth <= second.bandwidth
    for chip in CHIPS:
        for memory in chip.memory:
            found, size = find(f"{chip.name} {memory}GB")
            assert (found.name, size) == (chip.name, memory)
            assert found.gpu_cores <= chip.gpu_cores
    for text, cores, bandwidth in (
        ("M4 Max 36GB", 32, 410),
        ("M4 Max 48GB", 40, 546),
        ("m3 max 96gb", 30, 300),
        ("Apple M2 Max, 64 GB", 30, 400),  # sold with both: the slower
        (" M2  Max 96", 38, 400),
    ):
        chip, _ = find(text)
        assert (chip.gpu_cores, chip.bandwidth) == (cores, bandwidth)


def test_unknown_chips_and_sizes_are_refused():
    for text in ("", "M4 Max", "64GB", "M9 64GB", "M4 Mega 64GB", "M4 Ultra 64GB"):
        with pytest.raises(SettingsError) as caught:
            find(text)
        message = str(caught.value)
        assert message.startswith(f"chip is {text!r}; write it like 'M4 Max 64GB'")
        assert "M1, M1 Pro, M1 Max, M1 Ultra, M2" in message
    with pytest.raises(SettingsError, match="M4 Max is sold with 36, 48, 64, 128 GB"):
        find("M4 Max 65GB")
