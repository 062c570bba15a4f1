"""What a run may be told: every range by the field's name, and its learning rate."""

import math

import pytest

from mlx_dgemma.errors import DGemmaError, SettingsError
from mlx_dgemma.training.settings import TrainSettings

WHOLE = [0, -1, 1.5, 2.0, True, "4", None, math.nan, math.inf]
IMPOSSIBLE = {
    "iters": WHOLE,
    "batch_size": WHOLE,
    "grad_accumulation_steps": WHOLE,
    "max_seq_length": WHOLE,
    "steps_per_report": WHOLE,
    "steps_per_eval": WHOLE,
    "save_every": WHOLE,
    "warmup_steps": [-1, 0.5, False, "1", math.inf],
    "seed": [-1, 2**32, 1.0, None, True],
    "val_batches": [-2, 0.5, 25.0, True],
    "learning_rate": [0, -1e-4, 1001, math.nan, math.inf, "1e-4", True, 10**400],
    "weight_decay": [-1e-9, 1.1, math.nan, "0"],
    "max_grad_norm": [0, -1, math.nan, None],
    "encoder_loss_weight": [-0.1, 1001, math.nan, True],
    "self_conditioning": [-0.1, 1.1, math.nan, True],
    "levels": [(0.5, 0.4), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)],
    "optimizer": ["sgd", "AdamW", "", None, 1, ["adamw"]],
    "lr_schedule": ["linear", "", None],
}
ALLOWED = {
    "iters": [1, 10**9],
    "batch_size": [1, 4096],
    "grad_accumulation_steps": [1, 1000],
    "max_seq_length": [1, 262_144],
    "steps_per_report": [1],
    "steps_per_eval": [1],
    "save_every": [1, 10**9],
    "warmup_steps": [0, 10**6],
    "seed": [0, 2**32 - 1],
    "val_batches": [-1, 0, 1],
    "learning_rate": [1e-12, 1, 1e3],
    "weight_decay": [0, 0.0, 1],
    "max_grad_norm": [1e-12, 1, math.inf],
    "encoder_loss_weight": [0, 1e3],
    "self_conditioning": [0, 0.5, 1],
    "levels": [(0, 0), (0.0, 1.0), (1, 1), (0.25, 0.75)],
    "optimizer": ["adamw", "adam", "adafactor"],
    "lr_schedule": ["cosine", "constant"],
}


def pairs(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), pairs(IMPOSSIBLE))
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=f"^{name} (is|are) ") as caught:
        TrainSettings(**{name: value})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DGemmaError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "value"), pairs(ALLOWED))
def test_the_ends_of_every_range_are_allowed(name, value):
    assert getattr(TrainSettings(**{name: value}), name) == value


def test_every_number_that_can_be_set_is_checked():
    switches = {"mask_prompt", "grad_checkpoint"}
    assert vars(TrainSettings()).keys() == IMPOSSIBLE.keys() | switches


@pytest.mark.parametrize(("iters", "steps"), [(10, 3), (1, 2), (1000, 7)])
def test_iterations_are_a_multiple_of_those_in_an_update(iters, steps):
    with pytest.raises(SettingsError, match=f"iters is {iters}.*steps, {steps}$"):
        TrainSettings(iters=iters, grad_accumulation_steps=steps)


@pytest.mark.parametrize(
    ("iters", "steps", "updates"), [(12, 3, 4), (5, 1, 5), (6, 6, 1)]
)
def test_updates_are_iterations_over_accumulation(iters, steps, updates):
    settings = TrainSettings(iters=iters, grad_accumulation_steps=steps)
    assert settings.updates == updates


# The learning rate


def rates(**changes) -> list[float]:
    settings = TrainSettings(learning_rate=2.0, **changes)
    return [settings.rate(update) for update in range(settings.updates + 1)]


def test_the_rate_rises_linearly_to_its_peak():
    found = rates(iters=20, warmup_steps=8)
    assert found[:8] == pytest.approx([2 * n / 8 for n in range(1, 9)])
    assert found[8] == 2.0 and max(found) == 2.0


def test_the_rate_falls_along_a_cosine_to_a_tenth():
    found = rates(iters=110, warmup_steps=10)[10:]
    for n, rate in enumerate(found):
        assert rate == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * n / 100)) / 2)
    assert found[0] == 2.0
    assert found[50] == pytest.approx(1.1)
    assert found[-1] == pytest.approx(0.2)
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_the_rate_counts_updates_and_not_iterations():
    plain = rates(iters=20, warmup_steps=4)
    gathered = rates(iters=60, grad_accumulation_steps=3, warmup_steps=4)
    assert gathered == plain


def test_a_constant_rate_stays_at_its_peak_after_the_warmup():
    found = rates(iters=20, warmup_steps=5, lr_schedule="constant")
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[5:] == [2.0] * 16


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warmup_the_peak_comes_first(schedule):
    assert rates(iters=5, warmup_steps=0, lr_schedule=schedule)[0] == 2.0


def test_a_run_shorter_than_its_warmup_never_reaches_the_peak():
    assert rates(iters=3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("update", [21, 10**6])
def test_behind_the_end_the_rate_stays_at_a_tenth(update):
    settings = TrainSettings(learning_rate=2.0, iters=20, warmup_steps=4)
    assert settings.rate(update) == pytest.approx(0.2)


def test_the_rate_is_never_nothing_nor_above_the_peak():
    for iters, warmup in ((1, 0), (1, 1), (2, 1), (7, 7), (8, 7)):
        for rate in rates(iters=iters, warmup_steps=warmup):
            assert 0.2 - 1e-12 <= rate <= 2.0
