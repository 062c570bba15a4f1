"""A run is a function of settings, data and step: stopped, shared or killed."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from runs import command, environment, run, write_rows
from tiny import write_tiny

from mlx_dgemma import LoRA, TrainSettings, convert, load, train
from mlx_dgemma.adapters import folder as adapters
from mlx_dgemma.errors import DataError, SettingsError, TrainingError
from mlx_dgemma.training import record
from mlx_dgemma.training import trainer as trainer_module
from mlx_dgemma.training.finetune import measure, prepare
from mlx_dgemma.training.record import Saved, Trained, Validated
from mlx_dgemma.training.settings import Run
from mlx_dgemma.training.trainer import STATE, Trainer
from mlx_dgemma.training.update import Gradients

SHORT = {"iters": 8, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2}
SHORT |= {"steps_per_report": 2, "steps_per_eval": 4, "save_every": 4, "val_batches": 1}


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
    of_run = {field.name for field in fields(Run)}

    def begin(name, **changes) -> Trainer:
        given = {"model": tiny, "data": data, "lora": LoRA(rank=4)} | changes
        run = {key: given.pop(key) for key in of_run & given.keys()}
        settings = TrainSettings(**SHORT | given)
        return prepare(Run(adapter_path=tmp_path / name, settings=settings, **run))

    return begin


def finish(trainer, *, stop_at=None):
    """The events of a run, stopped after a report if asked."""
    events = []
    for event in trainer.events():
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
    "full": {"lora": None, "train_router": True},
}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(begin, tmp_path, how):
    whole, half = begin("a", **how), begin("b", **how)
    finish(whole)
    updates: list[int] = []
    half.on_update = updates.append
    events = finish(half, stop_at=4)
    assert updates == list(range(updates[0], 5, updates[0]))
    assert events[-1] == Saved(4, tmp_path / "b" / "adapters.safetensors")
    partial = tmp_path / "b" / ".partial-0123abcd"
    partial.write_bytes(b"half")  # of a killed run
    rest = begin("b", resume=True, **how)
    assert iterations(Trained, finish(rest)) == [6, 8]
    assert not partial.exists()
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
        next(line for line in process.stderr if "iteration 10:" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "--resume goes on" in rest
    _, metadata = mx.load(str(tmp_path / "a" / STATE), return_metadata=True)
    assert int(metadata["iteration"]) >= 10
    adapters.load(load(tiny)[0], tmp_path / "a")


def test_compiled_gradients_are_the_same(begin, unfused):
    trainer = begin("a", iters=1, grad_checkpoint=True)
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
    odd = replace(alone.run, settings=TrainSettings(batch_size=3))
    with pytest.raises(SettingsError, match="a multiple of the 2 ranks"):
        Trainer(odd, alone.model, alone.train, group=Rank(0))


def test_accumulated_gradients_are_the_mean_of_their_batches(begin, monkeypatch):
    trainer, given = begin("a", iters=2, grad_accumulation_steps=2), []
    tree, update = trainer.weights.tree, trainer.weights.update
    batches = [trainer.batches.train(trainer.train, n) for n in range(2)]
    parts = [arrays(trainer.gradients(tree, batch)[1]) for batch in batches]

    def watch(gradients, number):
        given.append(arrays(gradients))
        return update(gradients, number)

    monkeypatch.setattr(trainer.weights, "update", watch)
    finish(trainer)
    (found,) = given
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in found}
    assert_same(found, mean, atol=1e-6)


def test_a_loss_of_no_numbers_ends_the_run_and_keeps_what_was(begin):
    trainer, saved = begin("a", save_every=100), []
    update = trainer.weights.update

    def broken(gradients, number):
        nan = tree_map(lambda g: g * float("nan") if number == 5 else g, gradients)
        return update(nan, number)

    trainer.weights.update = broken
    with pytest.raises(TrainingError, match=r"iteration 6: .* is nan; iteration 5 is"):
        for event in trainer.events():
            saved += [event.iteration] if isinstance(event, Saved) else []
    assert saved == [5]
    kept = mx.load(str(trainer.folder / adapters.WEIGHTS))
    assert all(mx.isfinite(array).all().item() for array in kept.values())


def test_resuming_needs_the_same_run_and_no_run_is_written_over(begin, tiny, tmp_path):
    def refused(message, **changes):
        with pytest.raises(TrainingError, match=message):
            begin("a", **{"iters": 2, "resume": True} | changes)

    refused("nothing to --resume")
    finish(begin("a", iters=2))
    refused("holds a run already; add --resume", resume=False)
    refused("iters was 2 and is 12", iters=12)
    refused("seed was 0 and is 5", seed=5)
    refused("lora was", lora=LoRA(rank=3))
    refused("data was", data=write_rows(tmp_path / "other", train=23))
    convert(tiny, tmp_path / "q", quantize=True, q_group_size=32)
    refused("model was", model=tmp_path / "q")
    assert begin("a", iters=2, resume=True, steps_per_report=1, save_every=1).done == 2
    state = tmp_path / "a" / STATE
    content = state.read_bytes()
    arrays, metadata = mx.load(str(state), return_metadata=True)
    name = min(arrays)
    for change, message in (
        (lambda: state.write_bytes(content[: len(content) // 2]), "cannot be read"),
        (lambda: state.write_bytes(content[:-9] + b"?" + content[-8:]), "damaged"),
        (
            lambda: mx.save_safetensors(
                str(state), {n: a for n, a in arrays.items() if n != name}, metadata
            ),
            f"missing tensors: {name}",
        ),
        (
            lambda: mx.save_safetensors(
                str(state), arrays, metadata | {"iteration": "9" * 5000}
            ),
            "damaged",
        ),
    ):
        change()
        refused(message, iters=2)
    state.unlink()  # nor is any other file of an adapter or a user written over
    for name in (
        *("adapters.safetensors", "adapter_config.json", "loss.png"),
        *("0000002_adapters.safetensors", "log.jsonl"),
    ):
        folder = tmp_path / f"kept {name}"
        folder.mkdir()
        (folder / name).write_text("kept\n")
        with pytest.raises(TrainingError, match=name):
            begin(folder.name)
        assert (folder / name).read_text() == "kept\n"


def test_two_runs_do_not_write_to_one_folder(begin):
    one, other = begin("a"), begin("a")
    events = one.events()
    next(events)
    with pytest.raises(TrainingError, match="another run is writing to it"):
        next(other.events())
    events.close()
    next(other.events())


def test_killed_between_adapter_and_state_the_last_save_is_made_again(begin):
    first = begin("a", iters=8, save_every=4)
    save = trainer_module.save_arrays

    def killed(path, *given):
        if path.name == STATE and first.done == 8:
            raise KeyboardInterrupt
        save(path, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "save_arrays", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(first)
    rest = begin("a", iters=8, save_every=4, resume=True)
    assert rest.done == 4
    tokens = [e.trained_tokens for e in finish(rest) if isinstance(e, Trained)]
    assert tokens == sorted(tokens) and tokens[0] > rest.batches.settings.batch_size
    kept = mx.load(str(rest.folder / adapters.WEIGHTS))
    assert_same(kept, mx.load(str(rest.folder / f"0000008_{adapters.WEIGHTS}")))


def test_the_library_trains_and_measures(tiny, data, tmp_path):
    events, settings, out = [], TrainSettings(**SHORT), tmp_path / "a"
    adapter, on_event = LoRA(rank=2, num_layers=1), events.append
    last = train(tiny, data, out, lora=adapter, settings=settings, on_event=on_event)
    assert last == events[-2] and last.iteration == 8
    kinds = (Trained, [2, 4, 6, 8]), (Validated, [0, 4, 8]), (Saved, [4, 8])
    assert all(iterations(kind, events) == wanted for kind, wanted in kinds)
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    run = Run(model=tiny, data=data, adapter_path=out, settings=settings)
    tuned, base = (measure(each, -1) for each in (run, replace(run, adapter_path="")))
    assert tuned[0] < base[0]


def test_without_validation_data_there_is_no_validation(begin, tiny, data, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    (only / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    assert iterations(Validated, finish(begin("a", data=only, iters=2))) == []
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        measure(Run(model=tiny, data=only, adapter_path=""))


def test_a_run_begins_from_other_weights(begin, tmp_path):
    first = begin("a", iters=2)
    finish(first)
    path = tmp_path / "a" / "adapters.safetensors"
    second = begin("b", resume_adapter_file=path)
    assert_same(first.weights.master, second.weights.master)
    state = arrays(second.weights.optimizer.state)
    moments = [array for name, array in state.items() if name.endswith(".m")]
    assert second.done == 0 and moments and not np.any([a.any() for a in moments])
