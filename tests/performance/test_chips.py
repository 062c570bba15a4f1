"""Apple's chips: what is listed, and how a name finds it."""

from itertools import pairwise

import pytest

from mlx_dgemma.errors import SettingsError
from mlx_dgemma.performance.chips import CHIPS, find

# TFLOPS of the larger bin in Apple's press releases.
STATED = {
    "M1": 2.6,
    "M1 Pro": 5.2,
    "M1 Max": 10.4,
    "M1 Ultra": 21,
    "M2": 3.6,
    "M2 Pro": 6.8,
    "M2 Max": 13.6,
    "M2 Ultra": 27.2,
}


@pytest.mark.parametrize("name", STATED)
def test_derived_rates_are_those_apple_stated(name):
    *_, largest = (chip for chip in CHIPS if chip.name == name)
    assert largest.tflops == pytest.approx(STATED[name], rel=0.025)
    assert largest.tflops == largest.tflops_fp32


@pytest.mark.parametrize("name", ["M4", "M4 Max"])
def test_accelerators_give_over_four_times_the_generation_before(name):
    *_, before = (chip for chip in CHIPS if chip.name == name)
    *_, after = (chip for chip in CHIPS if chip.name == name.replace("4", "5"))
    assert after.gpu_cores == before.gpu_cores
    assert 4 < after.tflops / before.tflops < 4.5
    assert after.tflops_fp32 < 1.2 * before.tflops_fp32


def test_the_slower_bin_of_a_name_stands_first():
    for first, second in pairwise(CHIPS):
        if first.name == second.name:
            assert first.gpu_cores < second.gpu_cores
            assert first.bandwidth <= second.bandwidth
    names = [chip.name for chip in CHIPS]
    assert len(set(names)) == 19  # each name's bins side by side
    assert sum(a != b for a, b in pairwise(names)) == 18


@pytest.mark.parametrize(
    ("written", "cores", "bandwidth"),
    [
        ("M4 Max 36GB", 32, 410),
        ("M4 Max 48GB", 40, 546),
        ("M3 Max 96GB", 30, 300),
        ("M3 Max 128GB", 40, 400),
        ("M2 Max 64GB", 30, 400),  # sold with both: the slower
        ("M2 Max 96GB", 38, 400),
        ("M3 Ultra 512GB", 80, 819),
        ("M4 32GB", 10, 120),
        ("M5 Max 128GB", 40, 614),
    ],
)
def test_memory_decides_the_bin(written, cores, bandwidth):
    chip, memory = find(written)
    assert (chip.gpu_cores, chip.bandwidth) == (cores, bandwidth)
    assert memory in chip.memory
    assert written == f"{chip.name} {memory}GB"


@pytest.mark.parametrize(
    "written", ["m4 max 64gb", "Apple M4 Max, 64 GB", "M4  Max 64", " M4 Max 64GB "]
)
def test_spelling_is_free(written):
    assert find(written) == find("M4 Max 64GB")


def test_every_size_sold_is_found():
    for chip in CHIPS:
        for memory in chip.memory:
            found, size = find(f"{chip.name} {memory}GB")
            assert (found.name, size) == (chip.name, memory)
            assert found.gpu_cores <= chip.gpu_cores


@pytest.mark.parametrize(
    "written", ["", "M4 Max", "64GB", "M9 64GB", "M4 Mega 64GB", "M4 Ultra 64GB", "M"]
)
def test_an_unknown_chip_is_refused_with_the_known_ones(written):
    with pytest.raises(SettingsError) as caught:
        find(written)
    message = str(caught.value)
    assert message.startswith(f"chip is {written!r}; write it like 'M4 Max 64GB'")
    assert "M1, M1 Pro, M1 Max, M1 Ultra, M2" in message
    assert message.endswith("M5 Max, M5 Ultra")
    assert "\n" not in message


@pytest.mark.parametrize("written", ["M4 Max 65GB", "M4 Max 0"])
def test_an_unknown_memory_is_refused_with_the_sizes_sold(written):
    with pytest.raises(SettingsError) as caught:
        find(written)
    assert str(caught.value) == (
        f"chip is {written!r}; M4 Max is sold with 36, 48, 64, 128 GB"
    )
