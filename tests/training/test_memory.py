"""What a fine-tuning needs: against what MLX reports, in order, and in words."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from training_memory import WAYS, Model, estimated, measured, shape

from mlx_dgemma import convert, load
from mlx_dgemma.adapters.lora import TARGETS, LoRA
from mlx_dgemma.backends import BACKENDS
from mlx_dgemma.errors import HubError, SettingsError, TrainingError
from mlx_dgemma.performance.estimate import precision, usable_bytes
from mlx_dgemma.training import fit, memory
from mlx_dgemma.training.fit import advise
from mlx_dgemma.training.memory import Job, estimate, read_shape
from mlx_dgemma.training.settings import Run, TrainSettings

GB = 10**9
SMALL = Model(text=shape(64, 192, 64, 4, 256), canvas=16, batch=2, length=80)
CHECKPOINTED = {"grad_checkpoint": True}
SHORT = {"batch_size": 1, "max_seq_length": 512}


def job(model="26b-4bit", *, lora=LoRA(), num_layers=-1, more=None, **settings):  # noqa: B008
    """On a GPU, batches of 4 rows of 2048 tokens unless told otherwise."""
    given = *read_shape(model, None), TrainSettings(**settings), lora, num_layers
    return Job(*given, device=BACKENDS["metal"], **more or {})


def base(bits):
    return f"a base of {bits} bits (mlx_dgemma.convert -q --q-bits {bits})"


def total(*args, **kwargs):
    return memory.total(job(*args, **kwargs))


def test_within_a_quarter_of_what_mlx_reports():
    way = WAYS["LoRA, checkpoint"]
    assert estimated(SMALL, way) == pytest.approx(measured(SMALL, way), rel=0.25)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_more_of_anything_needs_more(checkpoint):
    everything = LoRA(keys=tuple(key for keys in TARGETS.values() for key in keys))
    for less, more in (
        ({"batch_size": 2}, {"batch_size": 4}),
        ({"max_seq_length": 1024}, {"max_seq_length": 2048}),
        ({"lora": LoRA(rank=4)}, {"lora": LoRA(rank=64)}),
        ({"lora": LoRA(num_layers=3)}, {"lora": LoRA()}),
        ({"optimizer": "adafactor"}, {"optimizer": "adamw"}),
        ({"encoder_loss_weight": 0.0}, {}),
        ({}, {"grad_accumulation_steps": 2}),
        ({}, {"lora": everything}),
        ({}, {"model": "26b-8bit"}),
        ({"model": "26b-mixed"}, {"model": "26b"}),
        ({"model": "26b"}, {"model": "26b", "lora": None}),
        ({"more": {"longest": 101}}, {}),
        ({"more": {"ranks": 2}}, {}),
    ):
        given = {"grad_checkpoint": checkpoint}
        assert total(**less | given) < total(**more | given), (less, more)


def test_the_released_model():
    """The figures of the README, and a full fine-tuning by hand."""
    sizes = {(1, 1024): 16.9, (1, 2048): 17.9, (4, 1024): 23.2, (4, 2048): 27.3}
    for (batch, length), size in sizes.items():
        settings = CHECKPOINTED | {"batch_size": batch, "max_seq_length": length}
        assert total(**settings) == pytest.approx(size * GB, abs=0.06 * GB)
    dense = job("26b", lora=None)
    need, last = estimate(dense), estimate(replace(dense, num_layers=2))
    assert need["weights"] / 2 == pytest.approx(dense.trained, abs=60)  # scalars
    assert need["adapters or masters"] == 4 * dense.trained
    assert need["optimizer"] == 8 * dense.trained
    assert last["weights"] == need["weights"]
    assert 12 < need["optimizer"] / last["optimizer"] < 20
    with pytest.raises(SettingsError, match="needs dense weights; use lora"):
        total(lora=None)


@pytest.mark.parametrize("options", [{}, {"quant_predicate": "mixed"}, {"q_bits": 8}])
def test_weights_are_those_of_the_checkpoint(tiny, tmp_path, options):
    folder = convert(tiny, tmp_path / "model", quantize=True, **options).path
    parameters = tree_flatten(load(folder)[0].parameters())
    _, storage = read_shape(folder, None)
    assert storage.weight_bytes == sum(a.nbytes for _, a in parameters)


@pytest.mark.parametrize(
    ("limit", "advice", "settings"),
    [
        (30, "--grad-checkpoint", {}),
        (
            25,
            "--batch-size 2 --grad-accumulation-steps 2 --iters 2000",
            CHECKPOINTED,
        ),
        (
            18.5,
            "--max-seq-length 2048",
            CHECKPOINTED | {"batch_size": 1, "max_seq_length": 4096},
        ),
        (20, "--rank 128", CHECKPOINTED | SHORT | {"lora": LoRA(rank=512)}),
        (30, base(8), CHECKPOINTED | SHORT | {"model": "26b"}),
        (5, "no change of these settings", {"model": "26b"}),
        (
            17.5,
            base(4) + ", --grad-checkpoint",
            {"model": "26b", "batch_size": 1, "max_seq_length": 1024},
        ),
    ],
)
def test_advice_is_the_first_single_change_that_is_enough_or_several(
    settings, limit, advice
):
    assert advise(job(**settings), limit * GB) == advice


@pytest.mark.parametrize("model", ["26b", "26b-4bit"])
def test_a_job_with_the_advised_flags_fits(model):
    limit = 17 * GB
    for settings in (
        {},
        CHECKPOINTED | {"batch_size": 12, "grad_accumulation_steps": 5},
        CHECKPOINTED | {"batch_size": 1, "lora": LoRA(rank=2048)},
    ):
        given = job(model, **settings)
        words = advise(given, limit)
        flags = {name: int(n) for name, n in re.findall(r"--([a-z-]+) (\d+)", words)}
        bits, rank = flags.pop("q-bits", None), flags.pop("rank", given.lora.rank)
        changes = {name.replace("-", "_"): n for name, n in flags.items()}
        if "--grad-checkpoint" in words:
            changes |= CHECKPOINTED
        after = replace(given, settings=replace(given.settings, **changes))
        after = replace(after, lora=replace(given.lora, rank=rank))
        if bits is not None:
            after = replace(after, storage=precision(after.config, f"{bits} bit"))
        assert memory.total(after) <= limit
        old, new = given.settings, after.settings
        examples = [s.batch_size * s.grad_accumulation_steps for s in (old, new)]
        assert examples[0] == examples[1] and old.updates == new.updates


def test_a_run_that_does_not_fit_is_refused_in_one_line(tiny, monkeypatch):
    given = Job(*read_shape(tiny, None), TrainSettings(), LoRA())
    fit.check(given)
    limit = memory.total(given) - 1
    monkeypatch.setattr(given.device, "memory", lambda: limit)
    with pytest.raises(TrainingError) as caught:
        fit.check(given)
    size = f"{limit / GB:.1f}"
    assert str(caught.value) == (
        f"training needs about {size} GB, this machine has {size} GB: "
        "--grad-checkpoint would make it fit"
    )
    fit.check(replace(given, settings=TrainSettings(grad_checkpoint=True)))
    fit.check(replace(given, longest=100))


def test_estimate_in_words(tiny):
    settings = {"batch_size": 1, "max_seq_length": 1024, "grad_checkpoint": True}
    for name in ("26b", "26b-4bit"):
        run = Run(model=name, data="", settings=TrainSettings(**settings))
        shown = fit.lines(run)
        assert "not measured on a Mac" in shown[0]
        assert shown[1].startswith(f"{name}, adapters of rank 16 of the last 30 layers")
        parts = [re.fullmatch(r"([a-z ]+?) +([\d.]+) GB", line) for line in shown]
        sizes = {found[1]: float(found[2]) for found in parts if found}
        needed, together = total(name, **settings), sizes.pop("together")
        assert together == pytest.approx(needed / GB, abs=0.05)
        assert together == pytest.approx(sum(sizes.values()), abs=0.05 * len(sizes))
        for line, memory_gb in zip(shown[-4:], fit.MACS, strict=True):
            limit = usable_bytes(memory_gb)
            assert line.startswith(f"Mac of {memory_gb} GB ({limit / GB:.1f} for one")
            assert line.endswith(": fits") == (needed <= limit)
    shown = fit.lines(Run(model=tiny, data="", lora=None, num_layers=2))
    assert "all weights of the last 2 layers" in shown[1]
    assert all(line.endswith(": fits") for line in shown[-4:])
    with pytest.raises(HubError, match=r"26b-3bit: no such folder.* 26b, 26b-8bit"):
        fit.lines(Run(model="26b-3bit", data=""))
