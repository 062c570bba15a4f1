"""What a fine-tuning needs: against what MLX reports, in order, and said to people."""

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
from mlx_dgemma.errors import HubError, SettingsError, TrainingError
from mlx_dgemma.performance.cost import weight_bytes
from mlx_dgemma.performance.estimate import PRECISIONS, usable_bytes
from mlx_dgemma.training import memory
from mlx_dgemma.training.finetune import TrainRequest
from mlx_dgemma.training.memory import NAMED, Job, Traits, advise, estimate, named
from mlx_dgemma.training.settings import TrainSettings

SMALL = {
    "words": Model(text=shape(128, 128, 64, 2, 16384), canvas=32, batch=1, length=96),
    "deep": Model(text=shape(64, 192, 64, 12, 256), canvas=16, batch=2, length=112),
    "experts": Model(
        text=shape(128, 128, 128, 3, 512, top_k_experts=4),
        canvas=16,
        batch=1,
        length=80,
        bits=4,
        dtype="bfloat16",
    ),
}
GB = 10**9


def job(model="26b-4bit", *, lora=LoRA(), more=None, **settings):  # noqa: B008
    """On a GPU, a step of 4 rows of 2048 tokens unless told otherwise."""
    config, storage = named(model)
    return Job(
        config=config,
        storage=storage,
        lora=lora,
        settings=TrainSettings(**settings),
        traits=Traits.gpu(),
        **more or {},
    )


def total(*args, **kwargs):
    return estimate(job(*args, **kwargs)).total


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("words", "LoRA, checkpoint"),
        ("deep", "LoRA, checkpoint"),
        ("deep", "full, checkpoint"),
        ("experts", "LoRA, checkpoint"),
    ],
)
def test_within_a_tenth_of_what_mlx_reports(name, way):
    model, chosen = SMALL[name], WAYS[way]
    assert estimated(model, chosen) == pytest.approx(measured(model, chosen), rel=0.1)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"batch_size": 2}, {"batch_size": 4}),
        ({"max_seq_length": 1024}, {"max_seq_length": 2048}),
        ({"lora": LoRA(rank=4)}, {"lora": LoRA(rank=64)}),
        ({"lora": LoRA(num_layers=3)}, {"lora": LoRA()}),
        ({"optimizer": "adafactor"}, {"optimizer": "adamw"}),
        ({"encoder_loss_weight": 0.0}, {}),
        ({}, {"grad_accumulation_steps": 2}),
        ({}, {"lora": LoRA(keys=tuple(k for v in TARGETS.values() for k in v))}),
        ({}, {"model": "26b-8bit"}),
        ({"model": "26b-mixed"}, {"model": "26b"}),
        ({"model": "26b"}, {"model": "26b", "lora": None}),
        ({"more": {"prefix": 100}}, {}),
        ({"more": {"ranks": 2}}, {}),
    ],
)
def test_more_of_anything_needs_more(less, more, again):
    assert total(**less, grad_checkpoint=again) < total(**more, grad_checkpoint=again)


def test_checkpoints_need_less():
    held = [estimate(job(grad_checkpoint=again)).activations for again in (False, True)]
    assert held[1] < held[0] / 4
    assert total(grad_checkpoint=True) < total() / 2


def test_the_longest_row_counts_if_it_is_shorter_than_the_settings_allow():
    assert total(more={"prefix": 700}) == total(max_seq_length=700 + 256)
    assert total(more={"prefix": 10**6}) == total()


def test_ranks_share_a_batch():
    assert total(batch_size=8, more={"ranks": 4}) == total(batch_size=2)


def test_parts_of_a_full_fine_tuning():
    dense = job("26b", lora=None, optimizer="adamw")
    need, trained = estimate(dense), sum(dense.trained.values())
    routers = 30 * (128 * 2816 + 2816 + 128 + 2)  # and two scalars a layer
    assert trained * 2 == need.weights - 2 * routers
    assert need.masters == 4 * trained and need.optimizer == 8 * trained
    half = replace(dense, settings=TrainSettings(optimizer="adafactor"))
    assert estimate(half).optimizer == 0
    last = estimate(replace(dense, num_layers=2))
    assert last.weights == need.weights and 12 < need.masters / last.masters < 20


@pytest.mark.parametrize("options", [{}, {"quant_predicate": "mixed"}, {"q_bits": 8}])
def test_weights_are_those_of_the_checkpoint(tiny, tmp_path, options):
    folder = convert(tiny, tmp_path / "model", quantize=True, **options).path
    config, storage = memory.stored(folder)
    parameters = tree_flatten(load(folder)[0].parameters())
    assert weight_bytes(config, storage) == sum(a.nbytes for _, a in parameters)
    assert Job(
        config=config, storage=storage, lora=LoRA(), settings=TrainSettings()
    ).quantized


def test_quantised_weights_cannot_be_trained_themselves():
    with pytest.raises(SettingsError, match="needs dense weights; use lora"):
        job(lora=None)


def test_the_release_at_4_bits():
    assert 14 * GB < total(grad_checkpoint=True) < 30 * GB
    short = total(batch_size=1, max_seq_length=1024, grad_checkpoint=True)
    assert 14 * GB < short < 18 * GB


def followed(words: str, given: Job) -> Job:
    """The job with the flags and the base that an advice names."""
    settings: dict = {"grad_checkpoint": given.settings.grad_checkpoint}
    settings["grad_checkpoint"] |= "--grad-checkpoint" in words
    for flag, value in re.findall(r"--([a-z-]+) (\d+)", words):
        settings[flag.replace("-", "_")] = int(value)
    settings.pop("q_bits", None)
    rank = settings.pop("rank", None)
    lora = given.lora
    if rank is not None:
        assert lora is not None
        lora = replace(lora, rank=rank)
    base = re.search(r"a base of (\d) bits", words)
    storage = PRECISIONS[f"{base[1]} bit"] if base else given.storage
    changed = replace(given.settings, **settings)
    return replace(given, settings=changed, lora=lora, storage=storage)


@pytest.mark.parametrize("limit", [15.5, 20, 30])
@pytest.mark.parametrize("model", ["26b", "26b-4bit"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_checkpoint": True, "batch_size": 12, "grad_accumulation_steps": 5},
        {"grad_checkpoint": True, "batch_size": 1, "max_seq_length": 600},
        {"lora": LoRA(rank=2048), "grad_checkpoint": True, "batch_size": 1},
    ],
)
def test_who_follows_advice_fits(settings, model, limit):
    given = job(model, **settings)
    words = advise(given, limit * GB)
    if estimate(given).total <= limit * GB:
        return
    if words is None:
        assert limit < 18
        return
    after = followed(words, given)
    assert estimate(after).total <= limit * GB
    assert (
        after.settings.batch_size * after.settings.grad_accumulation_steps
        == given.settings.batch_size * given.settings.grad_accumulation_steps
    )
    assert after.settings.updates == given.settings.updates


@pytest.mark.parametrize(
    ("settings", "limit", "advice"),
    [
        ({}, 30, "--grad-checkpoint"),
        (
            {"grad_checkpoint": True},
            25,
            "--batch-size 2 --grad-accumulation-steps 2 --iters 2000",
        ),
        (
            {"grad_checkpoint": True, "batch_size": 1, "max_seq_length": 4096},
            18,
            "--max-seq-length 2048",
        ),
        (
            {"lora": LoRA(rank=512), "grad_checkpoint": True, "max_seq_length": 512}
            | {"batch_size": 1},
            20,
            "--rank 128",
        ),
        (
            {"model": "26b", "grad_checkpoint": True, "max_seq_length": 512}
            | {"batch_size": 1},
            30,
            "a base of 8 bits (mlx_dgemma.convert -q --q-bits 8)",
        ),
        ({"model": "26b"}, 5, None),
    ],
)
def test_the_first_change_that_helps(settings, limit, advice):
    assert advise(job(**settings), limit * GB) == advice


def test_refused_in_one_line(tiny, monkeypatch):
    settings = TrainSettings(grad_checkpoint=False)
    memory.check(tiny, LoRA(), settings, -1)
    config, storage = memory.stored(tiny)
    whole = Job(config=config, storage=storage, lora=LoRA(), settings=settings)
    limit = estimate(whole).total - 1
    monkeypatch.setattr(memory, "device_bytes", lambda: limit)
    with pytest.raises(TrainingError) as caught:
        memory.check(tiny, LoRA(), settings, -1)
    size = f"{limit / GB:.1f}"
    assert str(caught.value) == (
        f"training needs about {size} GB, this machine has {size} GB: "
        "--grad-checkpoint would make it fit"
    )
    memory.check(tiny, LoRA(), replace(settings, grad_checkpoint=True), -1)
    memory.check(tiny, LoRA(), settings, -1, longest=100)
    memory.check(tiny, LoRA(), settings, -1, ranks=2)
    monkeypatch.setattr(memory, "device_bytes", lambda: 1000)
    with pytest.raises(TrainingError, match=r"0\.0 GB: no change of these settings"):
        memory.check(tiny, LoRA(), settings, -1)


def test_this_machine_has_memory():
    assert memory.device_bytes() > GB


@pytest.mark.parametrize("name", NAMED)
def test_lines_for_people(name):
    settings = TrainSettings(batch_size=1, max_seq_length=1024, grad_checkpoint=True)
    shown = memory.lines(TrainRequest(model=name, data="", settings=settings))
    assert shown[0] == memory.HEADLINE and "not measured on a Mac" in shown[0]
    assert shown[1].startswith(f"{name}, adapters of rank 16 of all layers, adamw")
    parts = [re.fullmatch(r"([a-z ]+?) +([\d.]+) GB", line) for line in shown]
    sizes = {found[1]: float(found[2]) for found in parts if found}
    together = sizes.pop("together")
    assert together == pytest.approx(sum(sizes.values()), abs=0.05 * len(sizes))
    assert together == pytest.approx(total(name, **vars(settings)) / GB, abs=0.05)
    macs = shown[-4:]
    for line, memory_gb in zip(macs, memory.MACS, strict=True):
        limit = usable_bytes(memory_gb)
        assert line.startswith(f"Mac of {memory_gb} GB ({limit / GB:.1f} for one")
        fits = total(name, **vars(settings)) <= limit
        assert line.endswith(": fits") == fits


def test_lines_of_a_folder(tiny):
    request = TrainRequest(model=tiny, data="", lora=None, num_layers=2)
    shown = memory.lines(request)
    assert "all weights of the last 2 layers" in shown[1]
    assert all(line.endswith(": fits") for line in shown[-4:])


def test_unknown_names_are_refused():
    with pytest.raises(HubError, match=r"26b-3bit: no such folder.* 26b, 26b-8bit"):
        memory.lines(TrainRequest(model="26b-3bit", data=""))
