"""Does the model fit a Mac, and how fast could it be at best?

What `cost` counts over the published figures in `chips`: a floor, not a measurement.
GB are 10^9 bytes, but for memory as sold, which is 2^30.
"""

from .. import backends
from ..backends import Backend, Metal
from ..checkpoint.config import ModelConfig
from ..checkpoint.quantize import Quantization
from ..diffusion.engine import PREFILL_STEP
from ..errors import BackendError
from .chips import CHIPS, Chip
from .cost import Storage, encode_cost, floor_seconds, prefix_bytes, step_cost

METAL = Metal()
# Ways to store the model, most precise first: quantization and recipe.
PRECISIONS = {
    "bf16": (None, "uniform"),
    "8 bit": (Quantization(bits=8), "uniform"),
    "mixed": (Quantization(bits=4), "mixed"),
    "4 bit": (Quantization(bits=4), "uniform"),
}
# Metal's recommendedMaxWorkingSetSize as public logs of llama.cpp show it; newer
# systems allow more, and `sudo sysctl iogpu.wired_limit_mb` raises it.
SMALL_SHARE, LARGE_SHARE, LARGE_FROM_GB = 2 / 3, 3 / 4, 36
K = 1024
PREFIXES, FITTING_PREFIX, STEP_PREFIX = (4 * K, 32 * K, 256 * K), 32 * K, K
STEPS = (8, 16, 27)
HEADLINE = (
    "ESTIMATE from published figures: a floor that no program reaches, "
    "not a measurement."
)


def precision(config: ModelConfig, name: str) -> Storage:
    """Return how a model is stored in one of PRECISIONS."""
    return Storage.planned(config, 2, *PRECISIONS[name])


def usable_bytes(memory_gb: int) -> float:
    """Return what Metal lets one process use of memory sold as `memory_gb` GB."""
    share = LARGE_SHARE if memory_gb >= LARGE_FROM_GB else SMALL_SHARE
    return share * memory_gb * 2**30


def working_bytes(config: ModelConfig, device: Backend = METAL) -> int:
    """Return the bytes in use besides weights and prefix, as the engine bounds them.

    Two copies of the attention scores of a tile; four of a canvas's logits over a
    chunk of the vocabulary, and that chunk's rows of the embedding made dense; what
    the experts need for a chunk of the prompt: a row in, gate and up, their product
    and a row out for each token and expert.
    """
    chunk = min(device.vocabulary_chunk, config.vocab_size)
    logits = 4 * 4 * config.canvas_length * chunk + 2 * config.hidden_size * chunk
    row = 2 * config.hidden_size + 3 * config.moe_intermediate_size
    experts = PREFILL_STEP * config.top_k_experts * row * 2
    return 2 * device.score_bytes + logits + experts


def memory_bytes(
    config: ModelConfig, storage: Storage, prefix: int, device: Backend = METAL
) -> int:
    """Return the bytes of weights, working memory and a prefix of `prefix` tokens."""
    fixed = storage.weight_bytes + working_bytes(config, device)
    return fixed + prefix_bytes(config, prefix, storage.value_bytes)


def check_fits(config: ModelConfig, storage: Storage) -> None:
    """Raise BackendError when a model with a prefix of 4K needs more than the device.

    Nothing is loaded for it. A device that states no memory takes everything.
    """
    device = backends.current()
    limit = device.memory()
    needed = memory_bytes(config, storage, PREFIXES[0], device)
    if limit is not None and needed > limit:
        sizes = [f"{n / 1e9:.1f} GB" for n in (needed, storage.weight_bytes, limit)]
        raise BackendError(
            f"the model needs about {sizes[0]}, {sizes[1]} of it weights; this device "
            f"has {sizes[2]}: convert it with --quantize, or try it with --force"
        )


def canvas_seconds(
    config: ModelConfig, storage: Storage, chip: Chip
) -> tuple[float, float]:
    """Return the floor of a step and of a commit behind STEP_PREFIX tokens."""
    shape = (config, storage, 1, STEP_PREFIX, config.canvas_length)
    rates = chip.tflops * 1e12, chip.bandwidth * 1e9
    return (
        floor_seconds(step_cost(*shape), *rates),
        floor_seconds(encode_cost(*shape), *rates),
    )


def lines(config: ModelConfig, chip: Chip, memory_gb: int) -> list[str]:
    """Return a table of all precisions on one machine; its first line is HEADLINE."""
    limit, verdict = usable_bytes(memory_gb), "nothing here"
    rows = [["", "weights", *(f"{n // K}K" for n in PREFIXES), "fits", "step ms"]]
    rows[0] += [f"{steps} st." for steps in STEPS]
    for name in PRECISIONS:
        storage = precision(config, name)
        memory = {n: memory_bytes(config, storage, n) for n in PREFIXES}
        fits = memory[FITTING_PREFIX] <= limit
        if fits and verdict == "nothing here":
            verdict = f"{name}, the most precise that"
        step, commit = canvas_seconds(config, storage, chip)
        sizes = [storage.weight_bytes, *memory.values()]
        rows.append([name, *(f"{size / 1e9:.1f}" for size in sizes)])
        rows[-1] += ["yes" if fits else "no", f"{step * 1e3:.1f}"]
        rates = [config.canvas_length / (n * step + commit) for n in STEPS]
        rows[-1] += [f"{rate:.0f}" for rate in rates]
    layout = "{:<6}{:>9}{:>8}{:>8}{:>8}{:>6}{:>10}{:>8}{:>8}{:>8}"
    return [
        HEADLINE,
        f"{chip.name} {memory_gb} GB: {chip.gpu_cores} GPU cores, "
        f"{chip.tflops:.1f} TFLOPS, {chip.bandwidth:g} GB/s; one process may use "
        f"{limit / 1e9:.1f} GB.",
        f"Memory in GB by prefix; step behind {STEP_PREFIX // K}K tokens; tokens/s by "
        f"steps per canvas of {config.canvas_length}, commit included.",
        "",
        *(layout.format(*row) for row in rows),
        "",
        f"Recommended: {verdict} fits with a prefix of {FITTING_PREFIX // K}K tokens.",
    ]


def table(config: ModelConfig) -> list[str]:
    """Return a line per chip: what fits each memory size sold, and the 4-bit floor."""
    shown = [
        HEADLINE,
        f"{'chip':<9}{'cores':>6}{'TFLOPS':>8}{'GB/s':>6}  {'4 bit step ms':>13}"
        f"{f'tok/s at {STEPS[1]}':>13}  most precise that fits, by memory in GB",
    ]
    stored = {name: precision(config, name) for name in PRECISIONS}
    for chip in CHIPS:
        fitting = []
        for memory_gb in chip.memory:
            usable = usable_bytes(memory_gb)
            fits = (
                name
                for name, storage in stored.items()
                if memory_bytes(config, storage, FITTING_PREFIX) <= usable
            )
            fitting.append(f"{memory_gb}: {next(fits, 'none')}")
        step, commit = canvas_seconds(config, stored["4 bit"], chip)
        rate = config.canvas_length / (STEPS[1] * step + commit)
        shown.append(
            f"{chip.name:<9}{chip.gpu_cores:>6}{chip.tflops:>8.1f}{chip.bandwidth:>6.0f}"
            f"  {step * 1e3:>13.0f}{rate:>13.0f}  {', '.join(fitting)}"
        )
    return shown
