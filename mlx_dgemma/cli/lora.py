"""`mlx_dgemma.lora`: fine-tune a model, or test one that was."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .common import (
    backend_option,
    debug_option,
    is_terminal,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from ..training.finetune import TrainRequest
    from ..training.record import Trained, Validated
    from ..training.trainer import Trainer

SECONDS_BETWEEN_LINES = 30


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option(
    "--model",
    help="Model folder, hub id or built-in name; to --estimate also 26b, 26b-8bit, "
    "26b-mixed, 26b-4bit.",
)
@click.option("--train", is_flag=True, help="Train.")
@click.option("--test", is_flag=True, help="Losses on test.jsonl, after training.")
@click.option(
    "--estimate", is_flag=True, help="Say how much memory it would take, and stop."
)
@click.option("--data", help="Folder with train.jsonl, valid.jsonl, test.jsonl.")
@click.option(
    "--fine-tune-type",
    type=click.Choice(["lora", "full"]),
    default="lora",
    help="Train adapters, or the weights themselves.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adam", "adafactor"]),
    default="adamw",
)
@click.option("--num-layers", type=int, default=-1, help="Last layers; -1 for all.")
@click.option("--rank", type=int, default=16, help="Rank of the adapters.")
@click.option("--scale", type=float, default=2.0, help="alpha / rank elsewhere.")
@click.option(
    "--target",
    multiple=True,
    type=click.Choice(["attention", "mlp", "self_conditioning", "experts", "router"]),
    help="Layers to adapt, once for each kind.  [default: the first three]",
    show_default=False,
)
@click.option("--train-router", is_flag=True, help="Routers too, when full.")
@click.option("--batch-size", type=int, default=4, help="Examples in a micro-batch.")
@click.option("--iters", type=int, default=1000, help="Micro-batches in all.")
@click.option(
    "--grad-accumulation-steps", type=int, default=1, help="Micro-batches an update."
)
@click.option("--learning-rate", type=float, default=1.5e-4, help="At its peak.")
@click.option(
    "--lr-schedule", type=click.Choice(["cosine", "constant"]), default="cosine"
)
@click.option("--warmup-steps", type=int, default=100, help="Updates to the peak.")
@click.option("--mask-prompt", is_flag=True, help="No encoder loss on the prompt.")
@click.option("--encoder-loss-weight", type=float, default=1.0, help="0 leaves it out.")
@click.option("--max-seq-length", type=int, default=2048, help="Most tokens of a row.")
@click.option("--grad-checkpoint", is_flag=True, help="Less memory, more time.")
@click.option("--val-batches", type=int, default=25, help="-1 for all of valid.jsonl.")
@click.option("--test-batches", type=int, default=500, help="-1 for all of test.jsonl.")
@click.option("--steps-per-report", type=int, default=10)
@click.option("--steps-per-eval", type=int, default=200)
@click.option("--save-every", type=int, default=100)
@click.option(
    "--adapter-path",
    default="adapters",
    help="Folder of the adapter; '' to --test the base.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --adapter-path.")
@click.option("--resume-adapter-file", help="Begin from these trained weights.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that are broken.")
@click.option("--seed", type=int, default=0)
@click.option("-c", "--config", type=click.Path(), help="YAML of these flags.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_option
@debug_option
@version_option
@click.pass_context
def main(context: click.Context, debug: bool, **given: Any) -> None:
    """Fine-tune DiffusionGemma on your own data, on this machine.

    Rows are {"messages": [...]}, whose last message is the answer to learn, or
    {"prompt", "completion"}. Interrupted, it saves; --resume goes on to the weights
    an uninterrupted run would have had.
    """
    with one_line_errors(debug):
        from ..errors import SettingsError

        if given["config"] is not None:
            _read_config(context, given)
        if not (given["train"] or given["test"] or given["estimate"]):
            raise SettingsError("give at least one of --train, --test and --estimate")
        for name in ("model", "data"):
            if given[name] is None and not (name == "data" and given["estimate"]):
                raise SettingsError(f"--{name} is missing")
        request = _request(given)
        if given["estimate"]:
            _estimate(request)
        if given["train"]:
            _train(request)
        if given["test"]:
            _test(request, given["test_batches"])


def _read_config(context: click.Context, given: dict[str, Any]) -> None:
    """Take from the YAML file what the command line does not say."""
    from ..training.yaml import flags

    types = {param.name: param for param in context.command.params}
    for name, value in flags(given["config"], set(given)).items():
        if name == "keys":  # of lora_parameters: finer than --target
            given[name] = value
        elif context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            given[name] = types[name].type_cast_value(context, value)


def _request(given: dict[str, Any]) -> "TrainRequest":
    """The request that the flags stand for."""
    from dataclasses import fields

    from ..adapters.lora import TARGETS, USUAL, LoRA
    from ..errors import SettingsError
    from ..training.finetune import TrainRequest
    from ..training.settings import TrainSettings

    lora, full = None, given["fine_tune_type"] == "full"
    if full and given["target"]:
        raise SettingsError("--target is for --fine-tune-type lora")
    if given["train_router"] and not full:
        raise SettingsError(
            "--train-router is for --fine-tune-type full; take --target"
        )
    if not full:
        keys = given.get("keys") or tuple(
            key for name in given["target"] or USUAL for key in TARGETS[name]
        )
        lora = LoRA(
            rank=given["rank"],
            scale=given["scale"],
            keys=keys,
            num_layers=given["num_layers"],
        )
    known = {field.name for field in fields(TrainSettings)}
    settings = TrainSettings(**{k: v for k, v in given.items() if k in known})
    return TrainRequest(
        model=given["model"],
        data=given["data"] or "",
        adapter_path=given["adapter_path"],
        lora=lora,
        num_layers=given["num_layers"],
        train_router=given["train_router"],
        settings=settings,
        resume=given["resume"],
        resume_adapter_file=given["resume_adapter_file"],
        skip_bad=given["skip_bad"],
        revision=given["revision"],
    )


def _estimate(request: "TrainRequest") -> None:
    from ..training import memory

    click.echo("\n".join(memory.lines(request)))


def _train(request: "TrainRequest") -> None:
    from ..adapters import folder as adapters
    from ..training.finetune import finish, prepare
    from ..training.record import Saved, Trained, Validated

    trainer = prepare(request)
    plan = trainer.plan
    talks = trainer.rank == 0
    if talks:
        count = adapters.count(adapters.trained(trainer.model))
        bad, cut = len(plan.train.bad), plan.train.truncated
        click.echo(
            f"{count:,} trained parameters; {len(plan.train)} examples, "
            f"{bad} bad rows left out, {cut} answers cut"
        )
    with _interruptible(trainer), _bar(trainer, talks) as show:
        for event in trainer.run():
            match event:
                case Trained() | Validated():
                    show(event)
                case Saved() if talks and event.iteration == plan.settings.iters:
                    click.echo(f"{event.path}: after iteration {event.iteration}")
    picture = finish(trainer)
    if talks and picture is None:
        click.echo(
            "no loss.png: matplotlib is missing; pip install 'mlx-dgemma[plot]'",
            err=True,
        )
    if trainer.done < plan.settings.iters:
        click.echo(
            f"stopped after iteration {trainer.done}, saved in {plan.folder}; "
            "--resume goes on",
            err=True,
        )
        sys.exit(130)


def _test(request: "TrainRequest", batches: int) -> None:
    from ..training.finetune import measure

    denoising, encoding = measure(request, batches)
    click.echo(f"test: denoising {denoising:.4f}, encoder {encoding:.4f}")


@contextmanager
def _interruptible(trainer: "Trainer") -> Iterator[None]:
    """The first Ctrl-C ends the run after the update at hand; the second at once."""

    def on_signal(number: int, frame: Any) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("saving after this update; again to leave at once", err=True)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar(trainer: "Trainer", talks: bool) -> Iterator[Any]:
    """A bar with the time left on a terminal; else a line for each report."""
    if not talks:
        yield lambda event: None
        return
    total = trainer.plan.settings.iters
    if not is_terminal(sys.stderr):
        began, first = time.monotonic(), trainer.done

        def say(event: "Trained | Validated") -> None:
            spent = time.monotonic() - began
            left = spent / max(event.iteration - first, 1) * (total - event.iteration)
            click.echo(f"{_words(event)}, {left:.0f} s left", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        Left(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=trainer.done)

        def show(event: "Trained | Validated") -> None:
            bar.update(task, completed=event.iteration, description=_words(event))

        yield show


def _words(event: "Trained | Validated") -> str:
    from ..training.record import Trained

    kind = "train" if isinstance(event, Trained) else "valid"
    text = f"iteration {event.iteration}: {kind} denoising {event.denoising:.4f}, "
    text += f"encoder {event.encoding:.4f}"
    if isinstance(event, Trained):
        text += f", {event.tokens_per_second:,.0f} tok/s"
        text += f", peak {event.peak_memory / 1e9:.2f} GB"
    return text


if __name__ == "__main__":
    main()
