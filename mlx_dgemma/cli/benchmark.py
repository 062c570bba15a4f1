"""`mlx_dgemma.benchmark`: how fast this machine denoises, and how fast it could."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .common import backend_option, debug_option, one_line_errors, version_option

if TYPE_CHECKING:
    from ..model.language import DiffusionGemma
    from ..performance.measure import Workload

SHAPES = ("26b", "tiny")
CHIP = "a Mac, as 'M4 Max 64GB'; 'all' lists every chip"


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Give one of --model, --synthetic, --estimate and --backends.",
)
@click.option("--model", help="Model folder, hub id or built-in name.")
@click.option(
    "--synthetic",
    type=click.Choice(SHAPES),
    help="Random weights of that shape, made here: times are real, text is noise.",
)
@click.option(
    "--estimate", metavar="MAC", help=f"Measure nothing: fit and floor on {CHIP}."
)
@click.option(
    "--backends",
    is_flag=True,
    help="Measure nothing: which device was chosen, and why.",
)
@click.option(
    "--q-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Bits per weight of --synthetic.  [default: dense]",
)
@click.option(
    "--q-mode",
    type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]),
    help="Quantisation mode of --synthetic.  [default: affine with --q-bits]",
)
@click.option(
    "--quant-predicate",
    type=click.Choice(["uniform", "mixed"]),
    default="uniform",
    show_default=True,
    help="Recipe of --synthetic; mixed: experts as asked, the rest at 8 bits.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of what --synthetic leaves dense.  [default: bfloat16]",
)
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens of a random prompt.",
)
@click.option("--prompt", help="A real prompt; canvases then stop when they are done.")
@click.option(
    "--canvases",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Canvases per row.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Denoising steps per canvas.",
)
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Rows denoised together.",
)
@click.option(
    "-n", "--num-trials", type=click.IntRange(1), default=5, show_default=True
)
@click.option(
    "--prefill-step-size",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Prompt tokens encoded at a time.",
)
@click.option("--roofline", is_flag=True, help="How far a step is from its floor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@backend_option
@debug_option
@version_option
def main(debug: bool, **given: Any) -> None:
    """Time prefill, denoising steps and commits of a model on this machine.

    Steps are a fixed number and canvases do not stop early, unless --prompt is
    given. Figures are medians over the trials, after one trial to warm up.
    """
    options = Options(**given)
    with one_line_errors(debug):
        options.check()
        if options.estimate is not None:
            _estimate(options.estimate)
            return
        if options.backends:
            _survey(options.as_json)
            return
        found = _measure(options)
        if options.as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            click.echo("\n".join(_lines(found)))


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    model: str | None
    synthetic: str | None
    estimate: str | None
    backends: bool
    q_bits: str | None
    q_mode: str | None
    quant_predicate: str
    dtype: str | None
    prompt_tokens: int
    prompt: str | None
    canvases: int
    steps: int
    batch_size: int
    num_trials: int
    prefill_step_size: int
    roofline: bool
    as_json: bool
    revision: str | None

    def check(self) -> None:
        """Raise SettingsError for flags that do not go together."""
        from ..errors import SettingsError

        subjects = (self.model, self.synthetic, self.estimate, self.backends or None)
        if sum(subject is not None for subject in subjects) != 1:
            raise SettingsError(
                "give one of --model, --synthetic, --estimate and --backends"
            )
        if self.synthetic is None and (self.q_bits or self.q_mode or self.dtype):
            raise SettingsError(
                "--q-bits, --q-mode and --dtype are for --synthetic, not for a model"
            )
        if self.quant_predicate != "uniform" and not (self.q_bits or self.q_mode):
            raise SettingsError("--quant-predicate mixed needs --q-bits or --q-mode")
        if self.estimate is not None and (self.as_json or self.roofline):
            raise SettingsError("--json and --roofline need something to measure")
        if self.backends and self.roofline:
            raise SettingsError("--roofline needs something to measure")
        if self.revision is not None and self.model is None:
            raise SettingsError("--revision needs --model")
        if self.prompt is not None and self.model is None:
            raise SettingsError("--prompt needs --model: noise cannot answer")


def _estimate(machine: str) -> None:
    from ..performance import chips, estimate
    from ..performance.synthetic import config_26b

    if machine == "all":
        lines = estimate.table(config_26b())
    else:
        lines = estimate.lines(estimate.estimate(config_26b(), *chips.find(machine)))
    click.echo("\n".join(lines))


def _survey(as_json: bool) -> None:
    from ..performance import devices

    found = devices.survey()
    click.echo(
        json.dumps(found, indent=2) if as_json else "\n".join(devices.lines(found))
    )


def _measure(options: Options) -> dict[str, Any]:
    """Everything that was measured, as --json prints it."""
    from ..performance import measure
    from ..performance.cost import Loaded, weight_bytes

    model, name, job = _subject(options)
    measure.run(model, job)
    trials = [measure.run(model, job, seed) for seed in range(options.num_trials)]
    found: dict[str, Any] = {
        "machine": asdict(measure.Machine()),
        "model": name,
        "weight_bytes": weight_bytes(model.config, Loaded.of(model)),
        "job": {
            "prompt_tokens": len(job.prompts[0]),
            "rows": len(job.prompts),
            "canvases": job.canvases,
            "canvas_length": model.config.canvas_length,
            "steps": job.steps,
            "early_stop": job.early,
        },
        "median": asdict(measure.Trial.median(trials)),
        "parts": asdict(measure.dissect(model, job)),
        "trials": [asdict(trial) for trial in trials],
    }
    if options.roofline:
        found["roofline"] = measure.roofline(model, job)
    return found


def _subject(options: Options) -> tuple["DiffusionGemma", str, "Workload"]:
    """The model, what to call it, and the job."""
    from ..checkpoint.convert import DTYPES
    from ..checkpoint.quantize import Quantization
    from ..loading import load
    from ..performance import synthetic
    from ..performance.measure import Workload, random_prompts
    from ..text.chat import chat_ids

    prompts = None
    if options.model is not None:
        model, tokenizer = load(options.model, revision=options.revision)
        name = options.model
        if options.prompt is not None:
            prompts = [chat_ids(tokenizer, options.prompt)] * options.batch_size
    else:
        assert options.synthetic is not None
        quantization = None
        if options.q_bits or options.q_mode:
            bits = int(options.q_bits) if options.q_bits else None
            quantization = Quantization.with_defaults(
                options.q_mode or "affine", bits, None
            )
        model = synthetic.synthetic_model(
            synthetic.SHAPES[options.synthetic](),
            quantization=quantization,
            recipe=options.quant_predicate,
            dtype=DTYPES[options.dtype or "bfloat16"],
            seed=0,
        )
        name = f"synthetic {options.synthetic}"
        if quantization is not None:
            name += f", {quantization.bits} bit {quantization.mode}"
            name += f", {options.quant_predicate}"
    job = Workload(
        prompts or random_prompts(model, options.batch_size, options.prompt_tokens),
        canvases=options.canvases,
        steps=options.steps,
        early=prompts is not None,
        prefill_step_size=options.prefill_step_size,
    )
    return model, name, job


def _lines(found: dict[str, Any]) -> list[str]:
    """What was measured, for a person."""
    from ..diffusion.report import size

    machine, job, median = found["machine"], found["job"], found["median"]
    step, parts = median["step_seconds"], found["parts"]
    rest = step - parts["body"] - parts["vocabulary"]
    per_step = f"{1e3 * step:,.1f} ms"
    lines = [
        f"{found['model']}: {size(found['weight_bytes'])} of weights",
        f"{machine['device']}; mlx {machine['mlx']}, "
        f"mlx-dgemma {machine['mlx_dgemma']}",
        f"{job['rows']} × {job['canvases']} × {job['canvas_length']} tokens, "
        f"{job['steps']} steps, behind {job['prompt_tokens']} tokens of prompt; "
        f"median of {len(found['trials'])}",
        "",
        f"{'prefill':<22}{median['prefill_tps']:>12,.1f} tok/s",
        f"{'denoising step':<22}{per_step:>15}",
        f"{'  body':<22}{1e3 * parts['body']:>12,.1f} ms",
        f"{'  vocabulary':<22}{1e3 * parts['vocabulary']:>12,.1f} ms",
        f"{'  host and the rest':<22}{1e3 * rest:>12,.1f} ms",
        f"{'commit':<22}{1e3 * parts['commit']:>12,.1f} ms",
        f"{'canvases':<22}{median['canvases_per_second']:>12,.3f} a second",
        f"{'tokens per forward':<22}{median['tokens_per_forward']:>12,.2f}",
        f"{'wall':<22}{median['wall_tps']:>12,.1f} tok/s",
        f"{'peak memory':<22}{size(median['peak_bytes']):>15}",
    ]
    if "roofline" in found:
        lines += ["", *_roofline_lines(found["roofline"], step)]
    return lines


def _roofline_lines(roofline: dict[str, Any], step: float) -> list[str]:
    """The floor of a step by part, and how far off the measured step is."""
    lines = [
        f"one copy {roofline['bytes_per_second'] / 1e9:,.1f} GB/s, one product "
        f"{roofline['flops_per_second'] / 1e12:,.3f} TFLOP/s, measured now",
        f"{'step':<20}{'GFLOP':>12}{'GB':>10}{'floor ms':>12}",
    ]
    for part, cost in roofline["parts"].items():
        lines.append(
            f"{part:<20}{cost['flops'] / 1e9:>12,.1f}{cost['bytes'] / 1e9:>10,.3f}"
            f"{1e3 * cost['seconds']:>12,.2f}"
        )
    floor = roofline["floor_seconds"]
    lines.append(
        f"floor {1e3 * floor:,.2f} ms; the step takes {step / floor:.1f} times that"
    )
    return lines


if __name__ == "__main__":
    main()
