"""Does a fine-tuning fit? From names and settings, before any weight is loaded.

What is counted and how far it was measured: `held` and `need`. GB are 10^9 bytes, but
for memory as sold, which is 2^30.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import backends
from ..adapters.lora import LoRA
from ..checkpoint import hub
from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.weights import read_layout
from ..errors import HubError, TrainingError
from ..performance.cost import Loaded, Storage, weight_bytes
from ..performance.estimate import PRECISIONS, usable_bytes
from ..performance.synthetic import config_26b
from .held import Traits
from .need import Job, estimate
from .settings import TrainSettings

if TYPE_CHECKING:
    from .finetune import TrainRequest


# The release in a precision, to be weighed without its files.
NAMED = {
    "26b": "bf16",
    "26b-8bit": "8 bit",
    "26b-mixed": "mixed",
    "26b-4bit": "4 bit",
}
MACS = (24, 32, 48, 64)  # GB
SHORTEST = 2  # canvases, of the rows that advice goes down to
HEADLINE = (
    "ESTIMATE of the most memory an update holds; not measured on a Mac or other GPU."
)


def lines(request: "TrainRequest") -> list[str]:
    """What a fine-tuning would need on a GPU, part by part, and which Macs have it.

    The model is a folder, hub id or built-in name, of which headers alone are read, or
    a name in NAMED. Raises HubError for other names.
    """
    config, storage = named(request.model, request.revision)
    job = Job(
        config=config,
        storage=storage,
        lora=request.lora,
        settings=request.settings,
        num_layers=request.num_layers,
        traits=Traits.gpu(),
    )
    need = estimate(job)
    shown = [HEADLINE, f"{request.model}, {_described(job)}.", ""]
    parts = {name: size for name, size in need.parts.items() if size}
    shown += [f"{name:<26}{_gb(size):>8} GB" for name, size in parts.items()]
    shown += [f"{'together':<26}{_gb(need.total):>8} GB", ""]
    for memory in MACS:
        limit = usable_bytes(memory)
        shown.append(
            f"Mac of {memory} GB ({_gb(limit)} for one process): {_fits(job, limit)}"
        )
    return shown


def check(
    source: Path,
    lora: LoRA | None,
    settings: TrainSettings,
    num_layers: int,
    *,
    ranks: int = 1,
    longest: int | None = None,
) -> None:
    """Raise TrainingError where this machine has less memory than would be needed.

    source   the model's folder, of which headers alone are read
    ranks    processes that share a micro-batch, each with a machine of its own
    longest  tokens of the longest row of the data, if known
    """
    config, storage = stored(source)
    job = Job(
        config=config,
        storage=storage,
        lora=lora,
        settings=settings,
        num_layers=num_layers,
        prefix=None if longest is None else longest - 1,
        ranks=ranks,
    )
    limit, needed = device_bytes(), estimate(job).total
    if limit is not None and needed > limit:
        advice = advise(job, limit)
        way = "no change of these settings would make it fit"
        raise TrainingError(
            f"training needs about {_gb(needed)} GB, this machine has {_gb(limit)} GB: "
            + (way if advice is None else f"{advice} would make it fit")
        )


def named(
    model: str | Path, revision: str | None = None
) -> tuple[ModelConfig, Storage]:
    """The shape of a model, and how its weights would lie in memory."""
    name = str(model)
    if name in NAMED and not Path(name).is_dir():
        return config_26b(), PRECISIONS[NAMED[name]]
    try:
        return stored(hub.resolve(model, revision))
    except HubError as error:
        known = ", ".join(NAMED)
        raise HubError(f"{error}; an estimate knows {known} as well") from None


def stored(folder: Path) -> tuple[ModelConfig, Storage]:
    """The same of a checkpoint, whose headers are read. Raises CheckpointError."""
    config = read_config(folder)
    layout = read_layout(folder, config)
    sizes: dict[str, int] = {}
    for name, info in layout.parameters.items():
        layer, _, part = name.rpartition(".")
        whole = f"{layer}.weight" if part in ("scales", "biases") else name
        sizes[whole] = sizes.get(whole, 0) + info.nbytes
    return config, Loaded(layout.parameters["norm.weight"].dtype.size, sizes=sizes)


def device_bytes() -> int | None:
    """Bytes that MLX may use on this machine, without swapping; None if unknown."""
    return backends.current().memory()


def advise(job: Job, limit: float) -> str | None:
    """The first change of settings, in words, with which the job takes at most `limit`
    bytes; several where none is enough alone; None where all together are not."""
    for change in CHANGES:
        for words, changed in change(job):
            if estimate(changed).total <= limit:
                return words
    picks = _picked(job, limit)
    if estimate(_changed(job, picks)[1]).total > limit:
        return None
    for pick in picks[::-1]:  # is it needed?
        others = [other for other in picks if other is not pick]
        if estimate(_changed(job, others)[1]).total <= limit:
            picks = others
    return ", ".join(_changed(job, picks)[0])


def _picked(job: Job, limit: float) -> list["Pick"]:
    """Of each change the mildest form that is enough, or else the one that helps most,
    on top of those before."""
    picks: list[Pick] = []
    for change in CHANGES:
        least, best = estimate(job).total, None
        for place, (_, changed) in enumerate(change(job)):
            needed = estimate(changed).total
            if needed < least:
                least, best = needed, (place, changed)
            if needed <= limit:
                break
        if best is not None:
            picks.append((change, best[0]))
            job = best[1]
    return picks


def _changed(job: Job, picks: list["Pick"]) -> tuple[list[str], Job]:
    """The words of all picks, and the job with them."""
    said = []
    for change, place in picks:
        words, job = list(change(job))[place]
        said.append(words)
    return said, job


# Ways to need less, each with its mildest form first: words, and the job so changed.
Changes = Iterator[tuple[str, Job]]
Pick = tuple[Callable[[Job], Changes], int]  # and which of its forms


def _checkpointed(job: Job) -> Changes:
    if not job.settings.grad_checkpoint:
        settings = replace(job.settings, grad_checkpoint=True)
        yield "--grad-checkpoint", replace(job, settings=settings)


def _smaller_batches(job: Job) -> Changes:
    """The same examples to an update, and as many updates."""
    settings = job.settings
    for parts in range(2, settings.batch_size + 1):
        size, rest = divmod(settings.batch_size, parts)
        if rest or size % job.ranks:
            continue
        steps = settings.grad_accumulation_steps * parts
        iters = settings.iters * parts
        smaller = replace(
            settings, batch_size=size, grad_accumulation_steps=steps, iters=iters
        )
        words = f"--batch-size {size} --grad-accumulation-steps {steps} --iters {iters}"
        yield words, replace(job, settings=smaller)


def _shorter_rows(job: Job) -> Changes:
    length = job.column + job.config.canvas_length
    while (length := length // 2) >= SHORTEST * job.config.canvas_length:
        settings = replace(job.settings, max_seq_length=length)
        yield f"--max-seq-length {length}", replace(job, settings=settings)


def _lower_ranks(job: Job) -> Changes:
    rank = 0 if job.lora is None else job.lora.rank
    while job.lora is not None and (rank := rank // 2):
        yield f"--rank {rank}", replace(job, lora=replace(job.lora, rank=rank))


def _coarser_bases(job: Job) -> Changes:
    """Quantised weights can be adapted, not trained themselves."""
    now = weight_bytes(job.config, job.storage)
    for bits in (8, 4):
        storage = PRECISIONS[f"{bits} bit"]
        if job.lora is not None and weight_bytes(job.config, storage) < now:
            words = f"a base of {bits} bits (mlx_dgemma.convert -q --q-bits {bits})"
            yield words, replace(job, storage=storage)


CHANGES = (
    _checkpointed,
    _smaller_batches,
    _shorter_rows,
    _lower_ranks,
    _coarser_bases,
)


def _fits(job: Job, limit: float) -> str:
    if estimate(job).total <= limit:
        return "fits"
    advice = advise(job, limit)
    if advice is None:
        return "does not fit, and no change of these settings would do"
    return f"does not fit; with {advice} it would"


def _described(job: Job) -> str:
    """What is trained, and on how much at a time."""
    settings, count = job.settings, len(job.layers)
    what = "all weights" if job.lora is None else f"adapters of rank {job.lora.rank}"
    which = "all" if count == len(job.config.layers) else f"the last {count}"
    again = "with" if settings.grad_checkpoint else "without"
    return (
        f"{what} of {which} layers, {settings.optimizer}: batches of "
        f"{settings.batch_size}, rows of at most {settings.max_seq_length} tokens, "
        f"{again} --grad-checkpoint"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
