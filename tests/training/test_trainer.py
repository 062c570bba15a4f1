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
from mlx_dgemma.training.finetune import TrainRequest, measure, prepare
from mlx_dgemma.training.record import Saved, Trained, Validated
from mlx_dgemma.training.trainer import STATE
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


def request(tiny, data, out, *, resume=False, lora=None, full=False, **changes):
    lora = None if full else lora or LoRA(rank=4)
    settings = TrainSettings(**SHORT | changes)
    return TrainRequest(
        model=tiny,
        data=data,
        adapter_path=out,
        lora=lora,
        train_router=full,
        settings=settings,
        resume=resume,
    )


def finished(asked, *, stop_at=None):
    """The events of a run, stopped after an iteration if asked, and its trainer."""
    trainer, events = prepare(asked), []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, Trained) and event.iteration == stop_at:
            trainer.stop()
    return events, trainer


def weights(trainer):
    return {name: np.array(a) for name, a in tree_flatten(trainer.weights.master)}


def changed(path):
    return path.stat().st_mtime_ns if path.exists() else None


def assert_same(first, second):
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_losses_fall_and_events_come_in_order(tiny, data, tmp_path):
    asked = request(tiny, data, tmp_path / "a", iters=24, learning_rate=5e-2)
    events, _ = finished(asked)
    trained = [event for event in events if isinstance(event, Trained)]
    assert [event.iteration for event in trained] == list(range(2, 25, 2))
    first, last = trained[0], trained[-1]
    assert last.denoising < first.denoising - 0.3
    assert last.encoding < first.encoding - 0.3
    validated = [e.iteration for e in events if isinstance(e, Validated)]
    assert validated == [0, *range(4, 25, 4)]
    saved = [e.iteration for e in events if isinstance(e, Saved)]
    assert saved == list(range(4, 25, 4))
    rows = record.read(tmp_path / "a" / "log.jsonl")
    assert len(rows) == len(trained) + len(validated)
    assert all(np.isfinite(row["denoising"]) for row in rows)


def test_a_report_is_the_mean_of_what_came_since_the_last(tiny, data, tmp_path):
    """Validation and saves in between change no figure."""
    often = {"steps_per_report": 1, "steps_per_eval": 1000, "save_every": 1000}
    each, _ = finished(request(tiny, data, tmp_path / "a", **often))
    each = [event for event in each if isinstance(event, Trained)]
    rare = {"steps_per_report": 4, "steps_per_eval": 3, "save_every": 3}
    means, _ = finished(request(tiny, data, tmp_path / "b", **rare))
    means = [event for event in means if isinstance(event, Trained)]
    assert [event.iteration for event in means] == [4, 8]
    for n, event in enumerate(means):
        part = each[4 * n : 4 * n + 4]
        for name in ("denoising", "encoding", "norm"):
            wanted = np.mean([vars(one)[name] for one in part])
            assert vars(event)[name] == pytest.approx(wanted, rel=1e-5), name
        assert event.learning_rate == part[-1].learning_rate
        assert event.trained_tokens == part[-1].trained_tokens


def test_what_was_saved_is_what_was_trained(tiny, data, tmp_path):
    out = tmp_path / "a"
    _, trainer = finished(request(tiny, data, out))
    model, _ = load(tiny, out)
    ids = mx.array([[2, 9, 10, 11]])
    canvas = mx.arange(16)[None] + 7
    found = []
    for each in (model, trainer.model):
        cache = each.make_cache()
        each.encode(ids, cache)
        found.append(np.array(each.denoise(canvas, cache)))
    np.testing.assert_array_equal(*found)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "adapters.safetensors",
        "adapter_config.json",
        "0000004_adapters.safetensors",
        "0000008_adapters.safetensors",
        "log.jsonl",
        STATE,
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    assert config["lora_parameters"]["rank"] == 4
    assert config["model"] == str(tiny) and config["iters"] == 8


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "accumulated", "full"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny, data, tmp_path, kind):
    how = {
        "adamw": {},
        "adafactor": {"optimizer": "adafactor"},
        "accumulated": {"grad_accumulation_steps": 2},
        "full": {"full": True},
    }[kind]
    _, whole = finished(request(tiny, data, tmp_path / "a", **how))
    events, _ = finished(request(tiny, data, tmp_path / "b", **how), stop_at=4)
    assert events[-1] == Saved(4, tmp_path / "b" / "adapters.safetensors")
    again, rest = finished(request(tiny, data, tmp_path / "b", resume=True, **how))
    assert [e.iteration for e in again if isinstance(e, Trained)] == [6, 8]
    assert_same(weights(whole), weights(rest))
    logs = [record.read(tmp_path / name / "log.jsonl") for name in "ab"]
    assert [(r["kind"], r["iteration"]) for r in logs[0]] == [
        (r["kind"], r["iteration"]) for r in logs[1]
    ]
    assert [r["denoising"] for r in logs[0]] == [r["denoising"] for r in logs[1]]


def test_what_a_killed_run_had_half_written_is_gone(tiny, data, tmp_path):
    out = tmp_path / "a"
    more = ["--iters", "2", "--save-every", "2"]
    assert run(command(tiny, data, out, *more)).returncode == 0
    partial = out / ".partial-0000002_adapters.safetensors"
    partial.write_bytes(b"half")
    assert run(command(tiny, data, out, *more, "--resume")).returncode == 0
    assert not partial.exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_weights(tiny, data, tmp_path):
    more = ["--iters", "16", "--save-every", "2", "--steps-per-eval", "1000"]
    ended = run(command(tiny, data, tmp_path / "whole", *more))
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "killed"
    parts, kills = command(tiny, data, out, *more), 0
    for attempt in range(3):
        resume = ["--resume"] if (out / STATE).exists() else []
        before = changed(out / STATE)
        with subprocess.Popen(
            [*parts, *resume], env=environment(), stderr=subprocess.DEVNULL
        ) as process:
            if attempt == 2:
                assert process.wait() == 0
                break
            while process.poll() is None and changed(out / STATE) == before:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    for name in ("adapters.safetensors", "0000016_adapters.safetensors"):
        whole = mx.load(str(tmp_path / "whole" / name))
        assert_same(
            {name: np.array(a) for name, a in whole.items()},
            {name: np.array(a) for name, a in mx.load(str(out / name)).items()},
        )
    assert not list(out.glob(".partial*"))


def test_two_ranks_walk_the_path_of_one(tiny, data, tmp_path):
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
    arrays, told = mx.load(str(tmp_path / "a" / STATE), return_metadata=True)
    assert int(told["iteration"]) >= 10 and arrays
    adapters.load(load(tiny)[0], tmp_path / "a")


@pytest.mark.parametrize("again", [False, True])
def test_compiled_gradients_are_the_same(tiny, data, tmp_path, unfused, again):
    asked = request(tiny, data, tmp_path / "a", iters=1, grad_checkpoint=again)
    _, trainer = finished(asked)
    settings, tree = trainer.settings, trainer.weights.tree
    compiled = Gradients(trainer.model, settings, compiled=True)
    for step in range(3):
        batch = trainer.batches.train(trainer.plan.train, step)
        found, plain = trainer.gradients(tree, batch)
        same, traced = compiled(tree, batch)
        assert same.denoising.item() == pytest.approx(found.denoising.item(), rel=1e-5)
        for (name, a), (_, b) in zip(
            tree_flatten(plain), tree_flatten(traced), strict=True
        ):
            np.testing.assert_allclose(
                np.array(a), np.array(b), atol=1e-5, err_msg=name
            )


def test_layers_run_again_train_alike(tiny, data, tmp_path):
    _, held = finished(request(tiny, data, tmp_path / "a", iters=4))
    asked = request(tiny, data, tmp_path / "b", iters=4, grad_checkpoint=True)
    _, again = finished(asked)
    for name, array in weights(held).items():
        np.testing.assert_allclose(weights(again)[name], array, atol=2e-4)


def test_a_run_begins_from_other_weights(tiny, data, tmp_path):
    _, first = finished(request(tiny, data, tmp_path / "a"))
    asked = TrainRequest(
        model=tiny,
        data=data,
        adapter_path=tmp_path / "b",
        lora=LoRA(rank=4),
        settings=TrainSettings(**SHORT),
        resume_adapter_file=tmp_path / "a" / "adapters.safetensors",
    )
    second = prepare(asked)
    assert second.done == 0
    assert_same(weights(first), weights(second))
    moments = [
        a for n, a in tree_flatten(second.weights.optimizer.state) if n[-2:] == ".m"
    ]
    assert moments and not any(mx.any(a).item() for a in moments)


def test_what_changes_the_path_cannot_be_resumed(tiny, data, tmp_path):
    out = tmp_path / "a"
    finished(request(tiny, data, out))
    for changes, named in (
        ({"iters": 12}, "iters was 8 and is 12"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"lora": LoRA(rank=3)}, "lora was"),
        ({"encoder_loss_weight": 0.5}, "encoder_loss_weight"),
    ):
        with pytest.raises(TrainingError, match=named):
            prepare(request(tiny, data, out, resume=True, **changes))
    other = write_rows(tmp_path / "other", train=23)
    with pytest.raises(TrainingError, match="data was"):
        prepare(request(tiny, other, out, resume=True))
    convert(tiny, tmp_path / "q", quantize=True, q_group_size=32)
    with pytest.raises(TrainingError, match="model was"):
        prepare(request(tmp_path / "q", data, out, resume=True))
    free = request(tiny, data, out, resume=True, steps_per_report=1, save_every=1)
    assert prepare(free).done == 8


def test_a_run_is_never_written_over(tiny, data, tmp_path):
    finished(request(tiny, data, tmp_path / "a"))
    before = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already; add --resume"):
        prepare(request(tiny, data, tmp_path / "a"))
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == before


def test_there_must_be_something_to_resume(tiny, data, tmp_path):
    with pytest.raises(TrainingError, match="nothing to --resume"):
        prepare(request(tiny, data, tmp_path / "a", resume=True))
    out = tmp_path / "b"
    finished(request(tiny, data, out))
    whole = (out / STATE).read_bytes()
    (out / STATE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match="cannot be read"):
        prepare(request(tiny, data, out, resume=True))


def test_the_library_trains_and_tests(tiny, data, tmp_path):
    events = []
    last = train(
        tiny,
        data,
        tmp_path / "a",
        on_event=events.append,
        lora=LoRA(rank=2, num_layers=1),
        settings=TrainSettings(**SHORT),
    )
    assert last is not None and last.iteration == 8
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    asked = request(tiny, data, tmp_path / "a")
    tuned, _ = measure(asked, -1)
    base, _ = measure(request(tiny, data, ""), -1)
    assert tuned < base


def test_without_validation_data_there_is_none(tiny, data, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    (only / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    events, _ = finished(request(tiny, only, tmp_path / "a"))
    assert not any(isinstance(event, Validated) for event in events)
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        measure(request(tiny, only, ""), -1)


def test_a_batch_must_divide_among_the_ranks(tiny, data, tmp_path):
    class Three:
        def rank(self):
            return 0

        def size(self):
            return 3

    from mlx_dgemma.training.trainer import Trainer

    trainer = prepare(request(tiny, data, tmp_path / "a"))
    with pytest.raises(SettingsError, match="a multiple of the 3 ranks"):
        Trainer(load(tiny)[0], trainer.plan, group=Three())


def test_accumulated_gradients_are_the_mean_of_their_batches(tiny, data, tmp_path):
    asked = request(tiny, data, tmp_path / "a", iters=2, grad_accumulation_steps=2)
    trainer, given = prepare(asked), []
    tree, take = trainer.weights.tree, trainer.weights.update

    def watch(gradients, number):
        given.append({name: np.array(g) for name, g in tree_flatten(gradients)})
        return take(gradients, number)

    parts = [
        dict(tree_flatten(trainer.gradients(tree, batch)[1]))
        for batch in (trainer.batches.train(trainer.plan.train, n) for n in range(2))
    ]
    trainer.weights.update = watch
    list(trainer.run())
    (found,) = given
    for name, array in found.items():
        mean = (np.array(parts[0][name]) + np.array(parts[1][name])) / 2
        np.testing.assert_allclose(array, mean, atol=1e-6, err_msg=name)
