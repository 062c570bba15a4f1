"""`mlx_dgemma.lora`: fine-tune a model, or test one that was."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..checkpoint.hub import resolve
from .common import (
    INTERRUPTED,
    MODEL_HELP,
    Command,
    backend_option,
    busy,
    debug_option,
    hub_options,
    is_terminal,
    one_line_errors,
    version_option,
)

if TYPE_CHECKING:
    from ..adapters.lora import LoRA
    from ..training.record import Trained, Validated
    from ..training.settings import Run
    from ..training.trainer import Trainer


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--model",
    help=f"{MODEL_HELP} To --estimate also 26b, 26b-8bit, 26b-mixed, 26b-4bit.",
)
@click.option("--train", is_flag=True, help="Train.")
@click.option("--test", is_flag=True, help="Losses on test.jsonl, after training.")
@click.option("--estimate", is_flag=True, help="Print how much memory it would take.")
@click.option("--data", help="Folder with train.jsonl, valid.jsonl, test.jsonl.")
@click.option(
    "--fine-tune-type",
    type=click.Choice(["lora", "full"]),
    default="lora",
    help="Train adapters, or the weights themselves.",
)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "adam", "adafactor"]), default="adamw"
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
@click.option(
    "--allow-special", is_flag=True, help="Let a text of a row spell special tokens."
)
@click.option("--seed", type=int, default=0)
@click.option("-c", "--config", type=click.Path(), help="YAML of these flags.")
@hub_options
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
        if given["config"] is not None:
            _read_config(context, given)
        if not (given["train"] or given["test"] or given["estimate"]):
            raise click.UsageError(
                "give at least one of --train, --test and --estimate"
            )
        if given["model"] is None:
            raise click.UsageError("--model is missing")
        if given["data"] is None and (given["train"] or given["test"]):
            raise click.UsageError("--data is missing")
        run = _run(given)
        if given["estimate"]:
            from ..training import fit

            click.echo("\n".join(fit.lines(run)))
        if given["train"]:
            _train(run)
        if given["test"]:
            from ..training.finetune import measure

            with busy("measuring test.jsonl"):
                losses = measure(run, given["test_batches"])
            click.echo("test: denoising {:.4f}, encoder {:.4f}".format(*losses))


def _read_config(context: click.Context, given: dict[str, Any]) -> None:
    """Take from the YAML file what the command line does not say."""
    from ..training.yaml import flags

    types = {param.name: param for param in context.command.params}
    for name, value in flags(given["config"], set(given)).items():
        if name == "keys":  # of lora_parameters: finer than --target
            given[name] = [value] if isinstance(value, str) else value
        elif context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            given[name] = types[name].type_cast_value(context, value)


def _run(given: dict[str, Any]) -> "Run":
    from ..training.settings import Run, TrainSettings

    settings = {f.name: given[f.name] for f in fields(TrainSettings) if f.name in given}
    given = given | {"settings": TrainSettings(**settings), "lora": _lora(given)}
    return Run(**{field.name: given[field.name] for field in fields(Run)})


def _lora(given: dict[str, Any]) -> "LoRA | None":
    """Return the adapters that the flags describe; None for a full fine-tuning."""
    from ..adapters.lora import TARGETS, USUAL, LoRA

    if given["fine_tune_type"] == "full":
        if given["target"]:
            raise click.UsageError("--target is for --fine-tune-type lora")
        return None
    if given["train_router"]:
        raise click.UsageError(
            "--train-router is for --fine-tune-type full; take --target"
        )
    keys = [key for name in given["target"] or USUAL for key in TARGETS[name]]
    return LoRA(
        rank=given["rank"],
        scale=given["scale"],
        keys=tuple(given.get("keys") or keys),
        num_layers=given["num_layers"],
    )


def _train(run: "Run") -> None:
    from ..adapters import folder as adapters
    from ..training.finetune import prepare
    from ..training.record import Saved

    resolve(run.model, run.revision)
    with busy(f"loading {run.model}"):
        trainer = prepare(run)
    iters, data, speaks = run.settings.iters, trainer.train, trainer.rank == 0
    if speaks:
        count = adapters.count(adapters.trained(trainer.model))
        click.echo(
            f"{count:,} trained parameters; {len(data)} examples, "
            f"{len(data.bad)} bad rows left out, {data.truncated} answers cut"
        )
    with _interruptible(trainer), _progress(trainer) as show:
        for event in trainer.events():
            if not isinstance(event, Saved):
                show(event)
            elif speaks and event.iteration == iters:
                click.echo(f"{event.path}: after iteration {event.iteration}")
    if speaks and not trainer.draw():
        click.echo(
            "no loss.png: matplotlib is missing; pip install 'mlx-dgemma[plot]'",
            err=True,
        )
    if trainer.done < iters:
        kept = f"saved in {trainer.folder}; --resume goes on"
        kept = kept if trainer.done else "nothing is saved"
        click.echo(f"stopped after iteration {trainer.done}, {kept}", err=True)
        sys.exit(INTERRUPTED)


@contextmanager
def _interruptible(trainer: "Trainer") -> Iterator[None]:
    """The first Ctrl-C ends the run after the current update; the second at once."""

    def on_signal(number: int, frame: Any) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # not click.echo, which writes into the line of the bar
        print("saving after this update; again to leave at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(trainer: "Trainer") -> Iterator[Callable[[Any], None]]:
    """A line for each event, and below them on a terminal a bar with the time left."""
    total, done, began = trainer.settings.iters, trainer.done, time.monotonic()

    def say(event: "Trained | Validated") -> None:
        spent = time.monotonic() - began
        left = spent / max(event.iteration - done, 1) * (total - event.iteration)
        click.echo(f"{_words(event)}, {left:.0f} s left", err=True)

    if trainer.rank or not is_terminal(sys.stderr):
        yield (lambda event: None) if trainer.rank else say
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with progress.Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total, completed=done)
        trainer.on_update = lambda done: bar.update(task, completed=done)
        yield lambda event: console.print(_words(event))


def _words(event: "Trained | Validated") -> str:
    from ..training.record import Trained

    losses = f"denoising {event.denoising:.4f}, encoder {event.encoding:.4f}"
    if not isinstance(event, Trained):
        return f"iteration {event.iteration}: valid {losses}"
    return (
        f"iteration {event.iteration}: train {losses}, "
        f"{event.tokens_per_second:,.0f} tok/s, peak {event.peak_memory / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
