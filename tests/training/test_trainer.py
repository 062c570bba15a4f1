"""A run is a function of settings, data and step: stopped, shared or killed."""

import json
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from runs import command, environment, run, write_rows
from tiny import write_tiny

from mlx_dgemma import LoRA, TrainSettings, convert, load, train
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.errors import DataError, SettingsError, TrainingError
from mlx_dgemma.training import record
from mlx_dgemma.training.finetune import measure, prepare
from mlx_dgemma.training.record import Saved, Trained, Validated
from mlx_dgemma.training.trainer import STATE, Trainer
from mlx_dgemma.training.update import Gradients

SHORT = {
    "iters": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "steps_per_report": 2,
    "steps_per_eval": 4,
    "save_every": 4,
    "val_batches": 1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A still smaller model: what a run does is judged here, not what it learns."""
    return write_tiny(
        tmp_path_factory.mktemp("tiny") / "model",
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_experts=2,
        top_k_experts=1,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture
def begin(tiny, data, tmp_path):
    """`begin("a", iters=4)`: the trainer of a run into a folder of that name."""

    def begin(name, *, model=tiny, data=data, options=None, **changes) -> Trainer:
        options = {"lora": LoRA(rank=4), **(options or {})}
        settings = TrainSettings(**SHORT | changes)
        return prepare(model, data, tmp_path / name, settings=settings, **options)

    return begin


def finish(trainer, *, stop_at=None):
    """The events of a run, stopped after a report if asked."""
    events = []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, Trained) and event.iteration == stop_at:
            trainer.stop()
    return events


def iterations(kind, events):
    return [event.iteration for event in events if isinstance(event, kind)]


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def assert_same(first, second, atol=0.0):
    first, second = arrays(first), arrays(second)
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_losses_fall_and_events_come_in_order(begin, tmp_path):
    events = finish(begin("a", iters=24, learning_rate=5e-2))
    assert iterations(Trained, events) == list(range(2, 25, 2))
    assert iterations(Validated, events) == list(range(0, 25, 4))
    assert iterations(Saved, events) == list(range(4, 25, 4))
    first, *_, last = (event for event in events if isinstance(event, Trained))
    assert last.denoising < first.denoising - 0.3
    assert last.encoding < first.encoding - 0.3
    rows = record.read(tmp_path / "a" / "log.jsonl")
    assert len(rows) == 12 + 7 and all(np.isfinite(row["denoising"]) for row in rows)


def test_a_report_is_the_mean_since_the_last(begin):
    """Validation and saves in between change no figure."""
    often = {"steps_per_report": 1, "steps_per_eval": 1000, "save_every": 1000}
    rare = {"steps_per_report": 4, "steps_per_eval": 3, "save_every": 3}
    each, means = (
        [event for event in finish(begin(name, **how)) if isinstance(event, Trained)]
        for name, how in (("a", often), ("b", rare))
    )
    assert [event.iteration for event in means] == [4, 8]
    for n, event in enumerate(means):
        part = each[4 * n : 4 * n + 4]
        for name in ("denoising", "encoding", "norm"):
            wanted = np.mean([vars(one)[name] for one in part])
            assert vars(event)[name] == pytest.approx(wanted, rel=1e-5), name
        assert event.learning_rate == part[-1].learning_rate
        assert event.trained_tokens == part[-1].trained_tokens


def test_what_was_saved_is_what_was_trained(begin, tiny, tmp_path):
    trainer, out, found = begin("a"), tmp_path / "a", []
    finish(trainer)
    for model in (load(tiny, out)[0], trainer.model):
        cache = model.make_cache()
        model.encode(mx.array([[2, 9, 10, 11]]), cache)
        found.append(np.array(model.denoise(mx.arange(16)[None] + 7, cache)))
    np.testing.assert_array_equal(*found)
    numbered = {f"000000{n}_adapters.safetensors" for n in (4, 8)}
    assert {path.name for path in out.iterdir()} == numbered | {
        *("adapters.safetensors", "adapter_config.json", "log.jsonl", STATE)
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    assert config["lora_parameters"]["rank"] == 4
    assert config["model"] == str(tiny) and config["iters"] == 8


KINDS = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},
    "accumulated": {"grad_accumulation_steps": 2},
    "full": {"options": {"lora": None, "train_router": True}},
}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(begin, tmp_path, how):
    whole, half = begin("a", **how), begin("b", **how)
    finish(whole)
    events = finish(half, stop_at=4)
    assert events[-1] == Saved(4, tmp_path / "b" / "adapters.safetensors")
    partial = tmp_path / "b" / ".partial-0000008_adapters.safetensors"
    partial.write_bytes(b"half")  # of a killed run
    resume = how.get("options", {}) | {"resume": True}
    rest = begin("b", **how | {"options": resume})
    assert not partial.exists()
    assert iterations(Trained, finish(rest)) == [6, 8]
    assert_same(whole.weights.state(), rest.weights.state())
    logs = [record.read(tmp_path / name / "log.jsonl") for name in "ab"]
    names = ("kind", "iteration", "denoising")
    one, two = ([[row[name] for name in names] for row in log] for log in logs)
    assert one == two


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_weights(tiny, data, tmp_path):
    more = ["--iters", "16", "--save-every", "2", "--steps-per-eval", "1000"]
    ended = run(command(tiny, data, tmp_path / "whole", *more))
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "killed"
    parts, kills = command(tiny, data, out, *more), 0

    def changed():
        return (out / STATE).stat().st_mtime_ns if (out / STATE).exists() else None

    for attempt in range(3):
        before = changed()
        resume = ["--resume"] if before else []
        with subprocess.Popen(
            [*parts, *resume], env=environment(), stderr=subprocess.DEVNULL
        ) as process:
            if attempt == 2:
                assert process.wait() == 0
                break
            while process.poll() is None and changed() == before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    for name in ("adapters.safetensors", "0000016_adapters.safetensors"):
        assert_same(mx.load(str(tmp_path / "whole" / name)), mx.load(str(out / name)))
    assert not list(out.glob(".partial*"))


@pytest.mark.slow
def test_two_ranks_get_the_losses_of_one(tiny, data, tmp_path):
    """Half of the batch each, over MLX's ring: the loss curve of one rank with all."""
    more = ["--iters", "6", "--steps-per-report", "1", "--steps-per-eval", "3"]
    alone = run(command(tiny, data, tmp_path / "one", *more))
    assert alone.returncode == 0, alone.stderr
    start = "from mlx._distributed_utils.launch import main; main()"  # mlx.launch
    launch = [sys.executable, "-c", start, "--backend", "ring", "-n", "2", "--"]
    both = run([*launch, *command(tiny, data, tmp_path / "two", *more)])
    assert both.returncode == 0, both.stderr
    one, two = (record.read(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6 + 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine["iteration"] == theirs["iteration"]
        for part in ("denoising", "encoding"):
            assert theirs[part] == pytest.approx(mine[part], abs=1e-5)


@pytest.mark.slow
def test_ctrl_c_saves(tiny, data, tmp_path):
    parts = command(tiny, data, tmp_path / "a", "--iters", "100000")
    with subprocess.Popen(
        parts, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "iteration 10:" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "--resume goes on" in rest
    state, metadata = mx.load(str(tmp_path / "a" / STATE), return_metadata=True)
    assert int(metadata["iteration"]) >= 10 and state
    adapters.load(load(tiny)[0], tmp_path / "a")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_gradients_are_the_same(begin, unfused, checkpoint):
    trainer = begin("a", iters=1, grad_checkpoint=checkpoint)
    finish(trainer)  # or the gradient of lora_a is zero
    compiled = Gradients(trainer.model, trainer.settings, compiled=True)
    for step in range(3):
        batch = trainer.batches.train(trainer.train, step)
        found, plain = trainer.gradients(trainer.weights.tree, batch)
        same, traced = compiled(trainer.weights.tree, batch)
        assert same.denoising.item() == pytest.approx(found.denoising.item(), rel=1e-5)
        assert_same(plain, traced, atol=1e-5)


def test_ranks_share_a_batch_and_its_gradients(begin):
    """Each rank has every second example; the mean of their gradients is one's."""

    class Rank:
        def __init__(self, rank):
            self.rank, self.size = lambda: rank, lambda: 2

    alone = begin("a", self_conditioning=0.0)
    weights, parts = alone.weights.tree, []
    wanted = alone.batches.train(alone.train, 3)
    for rank in range(2):
        batches = type(alone.batches)(alone.model.config, alone.settings, Rank(rank))
        batch = batches.train(alone.train, 3)
        assert batch.noisy.tolist() == wanted.noisy[rank::2].tolist()
        parts.append(arrays(alone.gradients(weights, batch)[1]))
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert_same(alone.gradients(weights, wanted)[1], mean, atol=1e-5)
    with pytest.raises(SettingsError, match="a multiple of the 2 ranks"):
        Trainer(
            model=alone.model,
            settings=TrainSettings(**SHORT | {"batch_size": 3}),
            train=alone.train,
            valid=None,
            folder=alone.folder,
            group=Rank(0),
        )


def test_accumulated_gradients_are_the_mean_of_their_batches(begin, monkeypatch):
    trainer, given = begin("a", iters=2, grad_accumulation_steps=2), []
    tree, take = trainer.weights.tree, trainer.weights.update

    def watch(gradients, number):
        given.append(arrays(gradients))
        return take(gradients, number)

    batches = [trainer.batches.train(trainer.train, n) for n in range(2)]
    parts = [arrays(trainer.gradients(tree, batch)[1]) for batch in batches]
    monkeypatch.setattr(trainer.weights, "update", watch)
    finish(trainer)
    (found,) = given
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in found}
    assert_same(found, mean, atol=1e-6)


def test_a_run_begins_from_other_weights(begin, tmp_path):
    first = begin("a", iters=2)
    finish(first)
    path = tmp_path / "a" / "adapters.safetensors"
    second = begin("b", options={"resume_adapter_file": path})
    assert second.done == 0
    assert_same(first.weights.master, second.weights.master)
    state = arrays(second.weights.optimizer.state)
    moments = [array for name, array in state.items() if name.endswith(".m")]
    assert moments and not np.any([array.any() for array in moments])


def test_what_changes_the_run_cannot_be_resumed(begin, tiny, tmp_path):
    finish(begin("a", iters=2))
    convert(tiny, tmp_path / "q", quantize=True, q_group_size=32)
    other = write_rows(tmp_path / "other", train=23)
    for changes, message in (
        ({"iters": 12}, "iters was 2 and is 12"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"options": {"lora": LoRA(rank=3)}}, "lora was"),
        ({"data": other}, "data was"),
        ({"model": tmp_path / "q"}, "model was"),
    ):
        changes = {"iters": 2} | changes
        options = {"resume": True} | changes.pop("options", {})
        with pytest.raises(TrainingError, match=message):
            begin("a", options=options, **changes)
    free = {"iters": 2, "steps_per_report": 1, "save_every": 1}
    assert begin("a", options={"resume": True}, **free).done == 2


def test_a_run_is_never_written_over_and_must_be_there_to_resume(begin, tmp_path):
    with pytest.raises(TrainingError, match="nothing to --resume"):
        begin("a", options={"resume": True})
    finish(begin("a", iters=2))
    with pytest.raises(TrainingError, match="holds a run already; add --resume"):
        begin("a")
    state = tmp_path / "a" / STATE
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    with pytest.raises(TrainingError, match="cannot be read"):
        begin("a", options={"resume": True})


def test_the_library_trains_and_measures(tiny, data, tmp_path):
    events, settings = [], TrainSettings(**SHORT)
    last = train(
        tiny,
        data,
        tmp_path / "a",
        on_event=events.append,
        lora=LoRA(rank=2, num_layers=1),
        settings=settings,
    )
    assert last == events[-2] and last.iteration == 8
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    tuned, base = (
        measure(tiny, data, folder, batches=-1, settings=settings)
        for folder in (tmp_path / "a", "")
    )
    assert tuned[0] < base[0]


def test_without_validation_data_there_is_no_validation(begin, tiny, data, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    (only / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    assert iterations(Validated, finish(begin("a", data=only, iters=2))) == []
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        measure(tiny, only, "")
