"""Does the model fit a Mac, and how fast could it be at best?

An estimate from published figures: what `cost` counts over what `chips` lists. It is
a floor, not a measurement. GB are 10^9 bytes, but for memory as sold, which is 2^30.
"""

from dataclasses import dataclass

import mlx.core as mx

from ..backends import Metal
from ..checkpoint.config import ModelConfig
from ..checkpoint.quantize import Quantization
from ..diffusion.engine import PREFILL_STEP
from .chips import CHIPS, Chip
from .cost import (
    Cost,
    Storage,
    encode_cost,
    floor_seconds,
    prefix_bytes,
    step_cost,
    weight_bytes,
)

# Ways to store the model, most precise first.
PRECISIONS = {
    "bf16": Storage.dense(mx.bfloat16),
    "8 bit": Storage.quantized(Quantization(bits=8)),
    "mixed": Storage.quantized(Quantization(bits=4), "mixed"),
    "4 bit": Storage.quantized(Quantization(bits=4)),
}
*_, LEAST = PRECISIONS
# Metal's recommendedMaxWorkingSetSize as public logs of llama.cpp show it; newer
# systems allow more, and `sudo sysctl iogpu.wired_limit_mb` raises it.
SMALL_SHARE, LARGE_SHARE, LARGE_FROM_GB = 2 / 3, 3 / 4, 36
K = 1024
PREFIXES = (4 * K, 32 * K, 256 * K)
FITTING_PREFIX = 32 * K
STEP_PREFIX = 1 * K
STEPS = (8, 16, 27)
HEADLINE = (
    "ESTIMATE from published figures: a floor that no program reaches, "
    "not a measurement."
)


@dataclass(frozen=True)
class Plan:
    """The model in one precision on one machine.

    weights             bytes
    memory              prefix in tokens -> bytes of weights, prefix and working memory
    fits                with a prefix of FITTING_PREFIX tokens
    step_seconds        of a denoising step behind STEP_PREFIX tokens
    commit_seconds      of encoding the finished canvas there
    tokens_per_second   denoising steps per canvas -> tokens of text, commit included
    """

    name: str
    weights: int
    memory: dict[int, int]
    fits: bool
    step_seconds: float
    commit_seconds: float
    tokens_per_second: dict[int, float]


@dataclass(frozen=True)
class Estimate:
    """All precisions on one machine; `limit` is what one process may use, in bytes."""

    chip: Chip
    memory_gb: int
    canvas: int
    limit: float
    plans: tuple[Plan, ...]

    @property
    def recommended(self) -> Plan | None:
        """The most precise that fits; None when none does."""
        return next((plan for plan in self.plans if plan.fits), None)


def estimate(config: ModelConfig, chip: Chip, memory_gb: int) -> Estimate:
    """What a machine with this chip and memory (GB as sold) could do at best."""
    return _judge(config, _loads(config), chip, memory_gb)


def usable_bytes(memory_gb: int) -> float:
    """What Metal lets one process use of memory sold as `memory_gb` GB."""
    share = LARGE_SHARE if memory_gb >= LARGE_FROM_GB else SMALL_SHARE
    return share * memory_gb * 2**30


def working_bytes(config: ModelConfig) -> int:
    """Bytes in use besides weights and prefix: what the engine bounds them to.

    Two copies of the attention scores of a tile; four of a canvas's logits over a
    chunk of the vocabulary, and that chunk's rows of the embedding made dense; what
    the experts hold of a chunk of the prompt: a row in, gate and up, their product and
    a row out for each token and expert.
    """
    scores = 2 * Metal.score_bytes
    chunk = min(Metal.vocabulary_chunk, config.vocab_size)
    logits = 4 * 4 * config.canvas_length * chunk + 2 * config.hidden_size * chunk
    row = 2 * config.hidden_size + 3 * config.moe_intermediate_size
    experts = PREFILL_STEP * config.top_k_experts * row * 2
    return scores + logits + experts


def lines(found: Estimate) -> list[str]:
    """A plain text table of the estimate; the first line says what it is."""
    chip, best = found.chip, found.recommended
    shown = [
        HEADLINE,
        f"{chip.name} {found.memory_gb} GB: {chip.gpu_cores} GPU cores, "
        f"{chip.tflops:.1f} TFLOPS, {chip.bandwidth:g} GB/s; one process may use "
        f"{_gb(found.limit)} GB.",
        f"Memory in GB by prefix; step behind {_k(STEP_PREFIX)} tokens; tokens/s by "
        f"steps per canvas of {found.canvas}, commit included.",
        "",
        f"{'':<6}{'weights':>9}"
        + "".join(f"{_k(prefix):>8}" for prefix in PREFIXES)
        + f"{'fits':>6}{'step ms':>10}"
        + "".join(f"{f'{steps} st.':>8}" for steps in STEPS),
    ]
    for plan in found.plans:
        shown.append(
            f"{plan.name:<6}{_gb(plan.weights):>9}"
            + "".join(f"{_gb(size):>8}" for size in plan.memory.values())
            + f"{'yes' if plan.fits else 'no':>6}{plan.step_seconds * 1e3:>10.1f}"
            + "".join(f"{rate:>8.0f}" for rate in plan.tokens_per_second.values())
        )
    fitting = f"fits with a prefix of {_k(FITTING_PREFIX)} tokens"
    verdict = f"{best.name}, the most precise that" if best else "nothing here"
    return [*shown, "", f"Recommended: {verdict} {fitting}."]


def table(config: ModelConfig) -> list[str]:
    """One line per chip: what fits each memory size sold, and the floor at 4 bit."""
    shown = [
        HEADLINE,
        f"{'chip':<9}{'cores':>6}{'TFLOPS':>8}{'GB/s':>6}  {LEAST + ' step ms':>13}"
        f"{f'tok/s at {STEPS[1]}':>13}  most precise that fits, by memory in GB",
    ]
    loads = _loads(config)
    for chip in CHIPS:
        found = [_judge(config, loads, chip, memory) for memory in chip.memory]
        least = found[0].plans[-1]
        fitting = ", ".join(
            f"{one.memory_gb}: {one.recommended.name if one.recommended else 'none'}"
            for one in found
        )
        shown.append(
            f"{chip.name:<9}{chip.gpu_cores:>6}{chip.tflops:>8.1f}{chip.bandwidth:>6.0f}"
            f"  {least.step_seconds * 1e3:>13.0f}"
            f"{least.tokens_per_second[STEPS[1]]:>13.0f}  {fitting}"
        )
    return shown


@dataclass(frozen=True)
class _Load:
    """What one precision asks of any machine."""

    name: str
    weights: int
    memory: dict[int, int]
    step: dict[str, Cost]
    commit: dict[str, Cost]


def _loads(config: ModelConfig) -> list[_Load]:
    loads = []
    for name, storage in PRECISIONS.items():
        weights = weight_bytes(config, storage)
        fixed = weights + working_bytes(config)
        canvas = config.canvas_length
        loads.append(
            _Load(
                name,
                weights,
                {n: fixed + prefix_bytes(config, n, storage) for n in PREFIXES},
                step_cost(config, storage, 1, STEP_PREFIX, canvas),
                encode_cost(config, storage, 1, STEP_PREFIX, canvas),
            )
        )
    return loads


def _judge(
    config: ModelConfig, loads: list[_Load], chip: Chip, memory_gb: int
) -> Estimate:
    limit = usable_bytes(memory_gb)
    rates = chip.tflops * 1e12, chip.bandwidth * 1e9
    plans = []
    for load in loads:
        step = floor_seconds(load.step, *rates)
        commit = floor_seconds(load.commit, *rates)
        speeds = {n: config.canvas_length / (n * step + commit) for n in STEPS}
        fits = load.memory[FITTING_PREFIX] <= limit
        plans.append(
            Plan(load.name, load.weights, load.memory, fits, step, commit, speeds)
        )
    return Estimate(chip, memory_gb, config.canvas_length, limit, tuple(plans))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _k(tokens: int) -> str:
    return f"{tokens // K}K"
