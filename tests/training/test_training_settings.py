"""Ranges of the settings, by the setting's name, and the learning rate."""

import math

import pytest

from mlx_dgemma.errors import SettingsError
from mlx_dgemma.training.settings import TrainSettings

NO_COUNT = [0, -1, 1.5, 2.0, True, "4", None, math.nan, math.inf]
COUNTS = ("iters", "batch_size", "grad_accumulation_steps", "max_seq_length")
COUNTS += ("steps_per_report", "steps_per_eval", "save_every")
REFUSED = {
    **dict.fromkeys(COUNTS, NO_COUNT),
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
    **{name: [1, 1000] for name in COUNTS},
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


@pytest.mark.parametrize("name", REFUSED)
def test_values_out_of_range_are_refused_by_name(name):
    for value in REFUSED[name]:
        with pytest.raises(SettingsError, match=f"^{name} (is|are) ") as caught:
            TrainSettings(**{name: value})
        assert "\n" not in str(caught.value)
    for value in ALLOWED[name]:
        TrainSettings(**{name: value})


def test_iters_is_a_multiple_of_accumulation_steps():
    assert TrainSettings(iters=12, grad_accumulation_steps=3).updates == 4
    for iters, steps in ((10, 3), (1, 2), (1000, 7)):
        with pytest.raises(SettingsError, match=f"iters is {iters}.*steps, {steps}$"):
            TrainSettings(iters=iters, grad_accumulation_steps=steps)


def rates(**changes) -> list[float]:
    settings = TrainSettings(learning_rate=2.0, **changes)
    return [settings.rate(update) for update in range(settings.updates + 1)]


def test_cosine_rate_rises_linearly_and_falls_to_a_tenth():
    found = rates(iters=110, warmup_steps=10)
    assert found[:10] == pytest.approx([2 * n / 10 for n in range(1, 11)])
    for n, rate in enumerate(found[10:]):
        assert rate == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * n / 100)) / 2)
    assert TrainSettings(learning_rate=2.0, iters=20).rate(10**6) == pytest.approx(0.2)
    # by updates, not by micro-batches; a short run never reaches the peak
    assert rates(iters=330, grad_accumulation_steps=3, warmup_steps=10) == found
    assert rates(iters=3, warmup_steps=10) == found[:4]


def test_constant_rate_stays_at_its_peak_after_warmup():
    found = rates(iters=8, warmup_steps=5, lr_schedule="constant")
    assert found == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert rates(iters=5, warmup_steps=0, lr_schedule="constant") == [2.0] * 6
