"""Whether a fine-tuning fits a machine, and which flags would make it fit."""

from dataclasses import replace
from typing import Any

from .. import backends
from ..errors import TrainingError
from ..performance.estimate import precision, usable_bytes
from .memory import Job, estimate, read_shape, total
from .settings import Run

MACS = (24, 32, 48, 64)  # GB


def lines(run: Run) -> list[str]:
    """Return what a run needs on a GPU, part by part, and which Macs have that much."""
    shape, gpu = read_shape(run.model, run.revision), backends.BACKENDS["metal"]
    job = Job(*shape, run.settings, run.lora, run.num_layers, device=gpu)
    parts = {part: size for part, size in estimate(job).items() if size}
    parts["together"] = needed = sum(parts.values())
    what = "all weights" if run.lora is None else f"adapters of rank {run.lora.rank}"
    shown = [
        "ESTIMATE of the peak of an update; not measured on a Mac or other GPU.",
        f"{run.model}, {what} of the last {len(job.layers)} layers, "
        f"{run.settings.optimizer}: batches of {run.settings.batch_size}, rows of at "
        f"most {run.settings.max_seq_length} tokens, "
        f"{'with' if run.settings.grad_checkpoint else 'without'} --grad-checkpoint.",
        "",
        *(f"{part:<26}{size / 1e9:>8.1f} GB" for part, size in parts.items()),
        "",
    ]
    for memory in MACS:
        limit, verdict = usable_bytes(memory), "fits"
        if needed > limit:
            verdict = f"does not fit; {advise(job, limit)} would make it fit"
        usable = f"{limit / 1e9:.1f} for one process"
        shown.append(f"Mac of {memory} GB ({usable}): {verdict}")
    return shown


def check(job: Job) -> None:
    """Raise TrainingError when a job needs more memory than this machine has."""
    limit, needed = backends.current().memory(), total(job)
    if limit is not None and needed > limit:
        raise TrainingError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has "
            f"{limit / 1e9:.1f} GB: {advise(job, limit)} would make it fit"
        )


def advise(job: Job, limit: float) -> str:
    """Return flags with which a job takes at most `limit` bytes.

    The first kind of change that is enough alone, as little of it as possible; or else
    all kinds on top of one another, beginning with the base.
    """
    for kinds in ([0], [1], [2], [3], [4], [4, 0, 1, 2, 3]):
        changed, flags = job, dict[int, str]()
        for kind in kinds:
            while total(changed) > limit and (steps := _steps(changed)[kind]):
                flags[kind], changed = steps[0]
        if total(changed) <= limit:
            return ", ".join(flags.values())
    return "no change of these settings"


def _steps(job: Job) -> list[list[tuple[str, Job]]]:
    """Return what saves memory, as flags and the job with them, smallest step first:
    checkpoints, smaller batches, shorter rows, lower ranks, a coarser base."""
    settings, size = job.settings, job.settings.batch_size

    def change(**changes: Any) -> tuple[str, Job]:
        flags = (f"--{name.replace('_', '-')} {n}" for name, n in changes.items())
        words = " ".join(flags).removesuffix(" True")
        return words, replace(job, settings=replace(settings, **changes))

    checkpoint = [] if settings.grad_checkpoint else [change(grad_checkpoint=True)]
    batches = [
        change(  # as many updates of as many examples
            batch_size=size // n,
            grad_accumulation_steps=settings.grad_accumulation_steps * n,
            iters=settings.iters * n,
        )
        for n in range(2, size + 1)
        if size % n == size // n % job.ranks == 0
    ]
    length = (job.prefix + job.config.canvas_length) // 2
    enough = length >= 2 * job.config.canvas_length
    rows = [change(max_seq_length=length)] if enough else []
    if job.lora is None:  # quantised weights can only be adapted
        return [checkpoint, batches, rows, [], []]
    half = replace(job.lora, rank=max(1, job.lora.rank // 2))
    ranks = [(f"--rank {half.rank}", replace(job, lora=half))] * (half != job.lora)
    bases = list[tuple[str, Job]]()
    for bits in (8, 4):
        storage = precision(job.config, f"{bits} bit")
        if storage.weight_bytes < job.storage.weight_bytes:
            words = f"a base of {bits} bits (mlx_dgemma.convert -q --q-bits {bits})"
            bases.append((words, replace(job, storage=storage)))
    return [checkpoint, batches, rows, ranks, bases]
