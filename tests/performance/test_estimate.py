"""Macs: what is listed, what fits, how fast it could be; worked out again by hand."""

from itertools import pairwise

import pytest

from mlx_dgemma import backends, load
from mlx_dgemma.checkpoint.config import read_config
from mlx_dgemma.checkpoint.weights import read_layout
from mlx_dgemma.errors import BackendError, SettingsError
from mlx_dgemma.performance import estimate
from mlx_dgemma.performance.chips import CHIPS, find
from mlx_dgemma.performance.cost import (
    Storage,
    encode_cost,
    floor_seconds,
    prefix_bytes,
    step_cost,
)
from mlx_dgemma.performance.synthetic import config_26b

RELEASE = config_26b()
K = 1024
LARGEST = {chip.name: chip for chip in CHIPS}


def at(text: str) -> list[str]:
    return estimate.lines(RELEASE, *find(text))


def test_lines_show_memory_and_speed_of_each_precision():
    scores, logits = 2 * 512 * 2**20, 32768 * (4 * 256 * 4 + 2816 * 2)
    working = scores + logits + 2048 * 8 * (2816 + 2 * 704 + 704 + 2816) * 2
    assert estimate.working_bytes(RELEASE) == working
    shown = at("M4 Max 64GB")
    assert shown[0].startswith("ESTIMATE") and "not a measurement" in shown[0]
    assert "M4 Max 64 GB: 40 GPU cores, 16.2 TFLOPS, 546 GB/s" in shown[1]
    assert "51.5 GB" in shown[1] and all(len(line) <= 110 for line in shown)
    rates, sizes = (40 * 256 * 1.578e9, 546e9), []
    for name in estimate.PRECISIONS:
        storage = estimate.precision(RELEASE, name)
        (row,) = [line for line in shown if line.startswith(f"{name} ")]
        sizes.append(storage.weight_bytes)
        prefixes = [prefix_bytes(RELEASE, n * K, 2) for n in (4, 32, 256)]
        memory = [sizes[-1] + working + prefix for prefix in prefixes]
        step = floor_seconds(step_cost(RELEASE, storage, 1, K, 256), *rates)
        commit = floor_seconds(encode_cost(RELEASE, storage, 1, K, 256), *rates)
        assert row.removeprefix(name).split() == [
            *(f"{size / 1e9:.1f}" for size in (sizes[-1], *memory)),
            "yes" if memory[1] <= 48 * 2**30 else "no",
            f"{step * 1e3:.1f}",
            *(f"{256 / (n * step + commit):.0f}" for n in (8, 16, 27)),
        ]
    assert sizes == pytest.approx([50.5e9, 26.8e9, 15.4e9, 14.2e9], abs=5e7)


def test_the_most_precise_that_fits_is_recommended():
    for text, name in (
        ("M4 16GB", "nothing here"),
        ("M4 24GB", "4 bit,"),
        ("M4 32GB", "mixed,"),
        ("M4 Max 48GB", "8 bit,"),
        ("M3 Max 96GB", "bf16,"),
    ):
        assert at(text)[-1].startswith(f"Recommended: {name} ")


def test_steps_measured_in_public_are_slower_than_the_floor():
    for text, milliseconds in (("M5 Max 128GB", 178), ("M1 Ultra 128GB", 644)):
        four_bit = at(text)[-3]
        assert four_bit.startswith("4 bit")
        assert float(four_bit.split()[7]) < milliseconds


def test_table_has_a_line_per_chip():
    shown = estimate.table(RELEASE)
    assert shown[0] == estimate.HEADLINE and len(shown) == 2 + len(CHIPS)
    order = ["none", "4 bit", "mixed", "8 bit", "bf16"]
    for row, chip in zip(shown[2:], CHIPS, strict=True):
        assert row.removeprefix(chip.name).split()[0] == str(chip.gpu_cores)
        fitting = [part.split(": ")[1] for part in row[48:].strip().split(", ")]
        ranks = [order.index(name) for name in fitting]
        assert len(ranks) == len(chip.memory) and ranks == sorted(ranks)
    (largest,) = [row for row in shown if row.startswith("M4 Max") and " 40 " in row]
    assert largest.endswith("48: 8 bit, 64: 8 bit, 128: bf16")
    four_bit = at("M4 Max 64GB")[-3].split()
    assert largest.split()[5:7] == [f"{float(four_bit[7]):.0f}", four_bit[9]]


# Chips


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


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny, monkeypatch):
    config, backend = read_config(tiny), backends.current()
    storage = Storage.of_files(read_layout(tiny, config).parameters)
    needed = estimate.memory_bytes(config, storage, 4 * K, backend)
    for limit, fits in ((needed, True), (None, True), (needed - 1, False)):
        monkeypatch.setattr(backend, "memory", lambda limit=limit: limit)
        if fits:
            load(tiny)
            continue
        why = r"needs about 0.0 GB, .* of it weights; .*--quantize, or .*--force"
        with pytest.raises(BackendError, match=why):
            load(tiny)
        load(tiny, force=True)


def test_unknown_chips_and_sizes_are_refused():
    for text in ("", "M4 Max", "64GB", "M9 64GB", "M4 Mega 64GB", "M4 Ultra 64GB"):
        with pytest.raises(SettingsError) as caught:
            find(text)
        message = str(caught.value)
        assert message.startswith(f"chip is {text!r}; write it like 'M4 Max 64GB'")
        assert "M1, M1 Pro, M1 Max, M1 Ultra, M2" in message
    with pytest.raises(SettingsError, match="M4 Max is sold with 36, 48, 64, 128 GB"):
        find("M4 Max 65GB")
