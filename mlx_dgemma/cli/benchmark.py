"""`mlx_dgemma.benchmark`: how fast this machine denoises, and how fast it could."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .common import (
    MODEL_HELP,
    Command,
    busy,
    common_options,
    force_option,
    hub_options,
    one_line_errors,
)

if TYPE_CHECKING:
    from ..model.language import DiffusionGemma
    from ..performance.measure import Trial, Workload

SUBJECTS = {"model", "synthetic", "estimate", "backends"}
SUBJECT_FLAGS = "--model, --synthetic, --estimate and --backends"


def choice(*names: str, of: str, **more: Any):
    return click.option(*names, type=click.Choice(of.split()), **more)


def count(*names: str, default: int, help: str):
    return click.option(
        *names, type=click.IntRange(1), default=default, show_default=True, help=help
    )


@click.command(cls=Command, epilog=f"Give one of {SUBJECT_FLAGS}.")
@click.option("--model", help=MODEL_HELP)
@choice(
    "--synthetic",
    of="26b tiny",
    help="Random weights of a shape: times are real, text is noise.",
)
@click.option("--estimate", help="Fit and floor on a Mac, 'M4 Max 64GB', or on 'all'.")
@click.option("--backends", is_flag=True, help="Which device was chosen, and why.")
@click.option("--beside", help="A token-by-token model, timed through mlx-lm.")
@choice("--q-bits", of="2 3 4 5 6 8", help="Bits of --synthetic.  [default: dense]")
@choice("--q-mode", of="affine mxfp4 mxfp8 nvfp4", help="Quantisation of --synthetic.")
@choice(
    "--quant-predicate",
    of="uniform mixed",
    default="uniform",
    show_default=True,
    help="mixed: experts as asked, the rest at 8 bits.",
)
@choice(
    "--dtype",
    of="float32 float16 bfloat16",
    help="Of dense weights.  [default: bfloat16]",
)
@count("-p", "--prompt-tokens", default=512, help="Tokens of a random prompt.")
@click.option("--prompt", help="A real prompt; canvases then stop when they are done.")
@count("--canvases", default=1, help="Canvases per row.")
@count("--steps", default=16, help="Denoising steps per canvas.")
@count("-b", "--batch-size", default=1, help="Rows denoised together.")
@count("-n", "--num-trials", default=5, help="Runs whose median is shown.")
@count("--prefill-step-size", default=2048, help="Prompt tokens encoded at a time.")
@click.option("--roofline", is_flag=True, help="How far a step is from its floor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@hub_options
@force_option
@common_options
def main(debug: bool, **given: Any) -> None:
    """Time prefill, denoising steps and commits of a model on this machine.

    Steps are a fixed number and canvases do not stop early, unless --prompt is
    given. Figures are medians over the trials, after one trial to warm up.
    """
    options = SimpleNamespace(**given)
    with one_line_errors(debug):
        _refuse_combinations(options)
        found: dict[str, Any] = {}
        if options.estimate is not None:
            lines = _estimate(options.estimate)
        elif options.backends:
            from .. import backends

            found, lines = backends.describe(), []
            for name, backend in found.items():
                lines.append(f"{name:<6} {backend['state']}")
                lines += [f"  {k:<18}{v}" for k, v in backend.items() if k != "state"]
        else:
            found = _measure(options)
            lines = _lines(found)
        click.echo(json.dumps(found, indent=2) if options.as_json else "\n".join(lines))


def _refuse_combinations(options: SimpleNamespace) -> None:
    """Raise UsageError for flags that do not go together."""
    given = {
        name for name, value in vars(options).items() if value not in (None, False)
    }
    measured, quantized = given & {"model", "synthetic"}, given & {"q_bits", "q_mode"}
    for allowed, message in (
        (len(given & SUBJECTS) == 1, f"give one of {SUBJECT_FLAGS}"),
        (
            "synthetic" in given or not (quantized or "dtype" in given),
            "--q-bits, --q-mode and --dtype are for --synthetic, not for a model",
        ),
        (
            quantized or options.quant_predicate == "uniform",
            "--quant-predicate mixed needs --q-bits or --q-mode",
        ),
        ("estimate" not in given or not options.as_json, "--estimate has no --json"),
        (measured or not options.roofline, "--roofline needs something to measure"),
        (measured or "beside" not in given, "--beside needs something to measure"),
        (
            "beside" not in given or options.batch_size == 1,
            "--beside compares one row; leave --batch-size out",
        ),
        ("model" in given or "revision" not in given, "--revision needs --model"),
        (
            "model" in given or "prompt" not in given,
            "--prompt needs --model: noise cannot answer",
        ),
    ):
        if not allowed:
            raise click.UsageError(message)


def _estimate(mac: str) -> list[str]:
    from ..performance import chips, estimate
    from ..performance.synthetic import config_26b

    if mac == "all":
        return estimate.table(config_26b())
    return estimate.lines(config_26b(), *chips.find(mac))


def _measure(options: SimpleNamespace) -> dict[str, Any]:
    """Return everything that was measured, as --json prints it."""
    from ..checkpoint import hub
    from ..loading import load
    from ..performance import measure
    from ..performance.cost import Storage
    from ..text.chat import chat_ids

    beside = None if options.beside is None else hub.resolve(options.beside)
    prompts = None
    if options.model is None:
        model, name = _synthetic(options)
    else:
        name = options.model
        folder = hub.resolve(name, options.revision)
        with busy(f"loading {name}"):
            model, tokenizer = load(folder, force=options.force)
        if options.prompt is not None:
            prompts = [chat_ids(tokenizer, options.prompt)] * options.batch_size
    job = measure.Workload(
        prompts
        or measure.random_prompts(model, options.batch_size, options.prompt_tokens),
        canvases=options.canvases,
        steps=options.steps,
        early=prompts is not None,
        prefill_step_size=options.prefill_step_size,
    )
    trials = _trials(model, job, options.num_trials)
    with busy("timing the parts of a step"):
        parts = measure.time_parts(model, job)
        roofline = measure.roofline(model, job) if options.roofline else None
    found: dict[str, Any] = {
        "machine": measure.machine(),
        "model": name,
        "weight_bytes": Storage.of_model(model).weight_bytes,
        "job": {
            "prompt_tokens": len(job.prompts[0]),
            "rows": len(job.prompts),
            "canvases": job.canvases,
            "canvas_length": model.config.canvas_length,
            "steps": job.steps,
            "early_stop": job.early,
        },
        "median": asdict(measure.Trial.median(trials)),
        "parts": parts,
        "trials": [asdict(trial) for trial in trials],
    }
    if roofline is not None:
        found["roofline"] = roofline
    if beside is not None:
        tokens = max(2, round(found["median"]["tokens"]))
        found["beside"] = _beside(beside, tokens, options)
    return found


def _beside(folder: Path, tokens: int, options: SimpleNamespace) -> dict[str, Any]:
    """Return what mlx-lm takes for as many tokens."""
    from ..performance.beside import run_beside

    with busy(f"timing {options.beside}"):
        return {"model": options.beside} | run_beside(
            folder,
            options.prompt_tokens if options.prompt is None else options.prompt,
            tokens=tokens,
            trials=options.num_trials,
            prefill_step_size=options.prefill_step_size,
        )


def _trials(model: "DiffusionGemma", job: "Workload", count: int) -> "list[Trial]":
    """Run trials, after one to warm up."""
    from ..performance import measure

    trials = []
    for number in range(count + 1):
        with busy(f"trial {number} of {count}; 0 warms up"):
            trials.append(measure.run(model, job, max(0, number - 1)))
    return trials[1:]


def _synthetic(options: SimpleNamespace) -> tuple["DiffusionGemma", str]:
    from ..checkpoint.convert import DTYPES
    from ..checkpoint.quantize import Quantization
    from ..performance.cost import Storage
    from ..performance.estimate import check_fits
    from ..performance.synthetic import SHAPES, synthetic_model

    q, name = None, f"synthetic {options.synthetic}"
    if options.q_bits is not None or options.q_mode is not None:
        bits = None if options.q_bits is None else int(options.q_bits)
        q = Quantization.with_defaults(options.q_mode or "affine", bits)
        name += f", {q.bits} bit {q.mode}, {options.quant_predicate}"
    config, dtype = SHAPES[options.synthetic](), DTYPES[options.dtype or "bfloat16"]
    recipe = options.quant_predicate
    if not options.force:
        check_fits(config, Storage.planned(config, dtype.size, q, recipe))
    made = {"quantization": q, "recipe": recipe, "dtype": dtype, "seed": 0}
    with busy("making random weights"):
        model = synthetic_model(config, **made)
    return model, name


def _lines(found: dict[str, Any]) -> list[str]:
    """Return the table of what `_measure` found."""
    from ..diffusion.report import format_bytes

    machine, job, median = found["machine"], found["job"], found["median"]
    step, parts = median["step_seconds"], found["parts"]
    rest = max(0.0, step - parts["body"] - parts["vocabulary"])  # timed apart
    lines = [
        f"{found['model']}: {format_bytes(found['weight_bytes'])} of weights",
        f"{machine['device']}; mlx {machine['mlx']}, "
        f"mlx-dgemma {machine['mlx_dgemma']}",
        f"{job['rows']} × {job['canvases']} × {job['canvas_length']} tokens, "
        f"{job['steps']} steps, behind {job['prompt_tokens']} tokens of prompt; "
        f"median of {len(found['trials'])}",
        "",
        _line("prefill", f"{median['prefill_tps']:,.1f} tok/s"),
        _line("denoising step", f"{1e3 * step:,.1f} ms"),
        _line("  body", f"{1e3 * parts['body']:,.1f} ms"),
        _line("  vocabulary", f"{1e3 * parts['vocabulary']:,.1f} ms"),
        _line("  host and the rest", f"{1e3 * rest:,.1f} ms"),
        _line("commit", f"{1e3 * parts['commit']:,.1f} ms"),
        _line("canvases", f"{median['canvases_per_second']:,.3f} a second"),
        _line("tokens per forward", f"{median['tokens_per_forward']:,.2f}"),
        _line("wall", f"{median['wall_tps']:,.1f} tok/s"),
        _line("peak memory", format_bytes(median["peak_bytes"])),
    ]
    if (roofline := found.get("roofline")) is not None:
        floor = roofline["floor_seconds"]
        lines += [
            "",
            f"one copy {roofline['bytes_per_second'] / 1e9:,.1f} GB/s, one product "
            f"{roofline['flops_per_second'] / 1e12:,.3f} TFLOP/s, measured now",
            f"{'step':<20}{'GFLOP':>12}{'GB':>10}{'floor ms':>12}",
            *(
                f"{part:<20}{cost['flops'] / 1e9:>12,.1f}{cost['bytes'] / 1e9:>10,.3f}"
                f"{1e3 * cost['seconds']:>12,.2f}"
                for part, cost in roofline["parts"].items()
            ),
            f"floor {1e3 * floor:,.2f} ms; the step takes "
            f"{step / floor:.1f} times that",
        ]
    if (beside := found.get("beside")) is not None:
        ours, theirs = median["wall_tps"], beside["median"]
        lines += [
            "",
            f"beside {beside['model']}, token by token through mlx-lm: "
            f"{beside['tokens']} tokens behind {beside['prompt_tokens']}",
            _line("prompt", f"{theirs['prompt_tps']:,.1f} tok/s"),
            _line("generation", f"{theirs['generation_tps']:,.1f} tok/s"),
            _line("peak memory", format_bytes(theirs["peak_bytes"])),
            f"wall: ours {ours:,.1f} tok/s, {beside['model']} "
            f"{theirs['wall_tps']:,.1f} tok/s, ratio {ours / theirs['wall_tps']:.2f}",
        ]
    return lines


def _line(label: str, value: str) -> str:
    number, _, unit = value.partition(" ")
    return f"{label:<22}{number:>12} {unit}".rstrip()


if __name__ == "__main__":
    main()
