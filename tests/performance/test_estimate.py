"""What fits a Mac and how fast it could be, worked out again by hand."""

import pytest

from mlx_dgemma.performance.chips import CHIPS, find
from mlx_dgemma.performance.cost import (
    encode_cost,
    floor_seconds,
    prefix_bytes,
    step_cost,
    total,
    weight_bytes,
)
from mlx_dgemma.performance.estimate import (
    HEADLINE,
    PRECISIONS,
    estimate,
    lines,
    table,
    usable_bytes,
    working_bytes,
)
from mlx_dgemma.performance.synthetic import config_26b, config_tiny

RELEASE = config_26b()
K = 1024


def at(written: str):
    return estimate(RELEASE, *find(written))


@pytest.mark.parametrize(
    ("memory", "usable"),
    [(16, 16 * 2 / 3), (32, 32 * 2 / 3), (36, 27), (64, 48), (128, 96)],
)
def test_metal_lets_a_process_use_a_part_of_memory(memory, usable):
    assert usable_bytes(memory) == pytest.approx(usable * 2**30)


def test_memory_is_weights_prefix_and_working_memory():
    found = at("M4 Max 64GB")
    scores, logits = 2 * 512 * 2**20, 32768 * (4 * 256 * 4 + 2816 * 2)
    experts = 2048 * 8 * (2816 + 2 * 704 + 704 + 2816) * 2
    working = scores + logits + experts
    assert working_bytes(RELEASE) == working
    assert [plan.name for plan in found.plans] == ["bf16", "8 bit", "mixed", "4 bit"]
    for plan in found.plans:
        storage = PRECISIONS[plan.name]
        assert plan.weights == weight_bytes(RELEASE, storage)
        assert list(plan.memory) == [4 * K, 32 * K, 256 * K]
        for prefix, size in plan.memory.items():
            held = plan.weights + prefix_bytes(RELEASE, prefix, storage)
            assert size == held + working
        assert plan.fits == (plan.memory[32 * K] <= 48 * 2**30)


def test_precisions_shrink_in_order():
    sizes = [plan.weights for plan in at("M4 Max 64GB").plans]
    assert sizes == sorted(sizes, reverse=True)
    gigabytes = [size / 1e9 for size in sizes]
    assert gigabytes == pytest.approx([50.5, 26.8, 15.4, 14.2], abs=0.05)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("M4 16GB", None),
        ("M4 24GB", "4 bit"),
        ("M4 32GB", "mixed"),
        ("M4 Max 36GB", "mixed"),
        ("M4 Max 48GB", "8 bit"),
        ("M4 Max 64GB", "8 bit"),
        ("M3 Max 96GB", "bf16"),
    ],
)
def test_the_most_precise_that_fits_is_recommended(written, name):
    found = at(written)
    assert (found.recommended.name if found.recommended else None) == name
    before = [plan.fits for plan in found.plans if plan.name != name]
    if name:
        assert not any(before[: list(PRECISIONS).index(name)])


def test_more_memory_never_recommends_less_precision():
    order = [None, "4 bit", "mixed", "8 bit", "bf16"]
    for chip in (chip for chip in CHIPS if len(chip.memory) > 2):
        best = [estimate(RELEASE, chip, size).recommended for size in chip.memory]
        ranks = [order.index(plan.name if plan else None) for plan in best]
        assert ranks == sorted(ranks)


def test_speed_is_steps_and_one_commit_per_canvas():
    chip, memory = find("M4 Max 64GB")
    for plan in estimate(RELEASE, chip, memory).plans:
        storage = PRECISIONS[plan.name]
        step = step_cost(RELEASE, storage, 1, K, 256)
        commit = encode_cost(RELEASE, storage, 1, K, 256)
        rates = 40 * 256 * 1.578e9, 546e9
        assert plan.step_seconds == pytest.approx(floor_seconds(step, *rates))
        assert plan.commit_seconds == pytest.approx(floor_seconds(commit, *rates))
        least = total(step).flops / rates[0], total(step).bytes / rates[1]
        assert plan.step_seconds >= max(least) * (1 - 1e-9)
        assert list(plan.tokens_per_second) == [8, 16, 27]
        for steps, rate in plan.tokens_per_second.items():
            seconds = steps * plan.step_seconds + plan.commit_seconds
            assert rate * seconds == pytest.approx(256)


@pytest.mark.parametrize(
    ("written", "milliseconds"), [("M5 Max 128GB", 178), ("M1 Ultra 128GB", 644)]
)
def test_steps_measured_in_public_lie_above_the_floor(written, milliseconds):
    assert at(written).plans[-1].step_seconds * 1e3 < milliseconds


def test_the_canvas_of_the_model_is_what_is_timed():
    chip, memory = find("M4 16GB")
    found = estimate(config_tiny(), chip, memory)
    assert found.canvas == 16
    plan = found.plans[0]
    seconds = 8 * plan.step_seconds + plan.commit_seconds
    assert plan.tokens_per_second[8] * seconds == pytest.approx(16)
    assert found.recommended is plan


def test_lines_say_that_they_are_an_estimate_and_show_the_plans():
    found = at("M4 Max 64GB")
    shown = lines(found)
    assert shown[0] == HEADLINE
    assert HEADLINE.startswith("ESTIMATE") and "not a measurement" in HEADLINE
    assert "M4 Max 64 GB: 40 GPU cores, 16.2 TFLOPS, 546 GB/s" in shown[1]
    assert "51.5 GB" in shown[1]
    for plan in found.plans:
        (row,) = [line for line in shown if line.startswith(f"{plan.name} ")]
        words = row.removeprefix(plan.name).split()
        assert words[:4] == [
            f"{size / 1e9:.1f}" for size in (plan.weights, *plan.memory.values())
        ]
        assert words[4] == ("yes" if plan.fits else "no")
        assert words[5] == f"{plan.step_seconds * 1e3:.1f}"
        assert words[6:] == [f"{n:.0f}" for n in plan.tokens_per_second.values()]
    assert shown[-1].startswith("Recommended: 8 bit,")
    assert lines(at("M4 16GB"))[-1].startswith("Recommended: nothing here fits")
    assert all(len(line) <= 110 for line in shown)


def test_the_table_has_a_line_per_chip():
    shown = table(RELEASE)
    assert shown[0] == HEADLINE
    assert len(shown) == 2 + len(CHIPS)
    for row, chip in zip(shown[2:], CHIPS, strict=True):
        assert row.startswith(f"{chip.name} ")
        words = row.removeprefix(chip.name).split()
        assert words[0] == str(chip.gpu_cores)
        if chip.name not in ("M1", "M4 Max", "M5 Ultra"):
            continue  # one of each sort will do
        plan = estimate(RELEASE, chip, chip.memory[0]).plans[-1]
        assert words[3] == f"{plan.step_seconds * 1e3:.0f}"
        assert words[4] == f"{plan.tokens_per_second[16]:.0f}"
    (largest,) = [row for row in shown if row.startswith("M4 Max") and " 40 " in row]
    assert largest.endswith("48: 8 bit, 64: 8 bit, 128: bf16")
