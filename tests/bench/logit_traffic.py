"""Count how often a denoising step reads and writes its logits: ours and mlx-vlm's.

    python tests/bench/logit_traffic.py --checkpoint FOLDER

Counts in the exported graph of one step, so the figure holds on any machine: inputs and
outputs of operations whose last axis is the vocabulary or a chunk of it, in units of a
whole (L, V) array, and the largest such array. Operations that move no data, as
reshapes, are left out. Prints Markdown.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dgemma import backends

VIEWS = frozenset(
    "AsStrided AsType Broadcast BroadcastAxes Contiguous Copy Depends ExpandDims "
    "Flatten Reshape Slice Split Squeeze StopGradient Transpose Unflatten View".split()
)
GATHERS = frozenset({"Gather", "GatherAxis"})  # read a few elements of a row
ELEMENTWISE = frozenset(
    "Abs Add Cos Divide Equal Exp Greater GreaterEqual Less LessEqual Log Log1p "
    "LogAddExp Maximum Minimum Multiply Negative Power Select Sigmoid Sin Sqrt Square "
    "Subtract Tanh".split()
)


@dataclass(frozen=True)
class Operation:
    """One operation of a graph: (name, elements) of what it reads and writes."""

    name: str
    inputs: list[tuple[str, int]]
    outputs: list[tuple[str, int]]


def operations(step, given, vocabulary: int) -> list[Operation]:
    """Return the operations of a step that touch an array of logits, in order."""
    found: list[Operation] = []
    made: dict[str, tuple[str, int]] = {}  # a view is the array that it shows
    chunk = backends.current().vocabulary_chunk
    widths = {vocabulary, chunk, vocabulary % chunk}

    def weigh(name: str, shape: tuple[int, ...]) -> tuple[str, int]:
        logits = shape and shape[-1] in widths
        return made.setdefault(name, (name, math.prod(shape) if logits else 0))

    def collect(part: dict) -> None:
        if part["type"] != "primitive":
            return
        inputs = [weigh(name, shape) for name, shape, _ in part["inputs"]]
        if part["name"] in GATHERS:
            inputs = [(name, 0) for name, _ in inputs]
        if part["name"] in VIEWS:
            for place, (name, _, _) in enumerate(part["outputs"]):
                made[name] = inputs[min(place, len(inputs) - 1)]
            return
        outputs = [weigh(name, shape) for name, shape, _ in part["outputs"]]
        if any(size for _, size in inputs + outputs):
            found.append(
                Operation(
                    part["name"],
                    [one for one in inputs if one[1]],
                    [one for one in outputs if one[1]],
                )
            )

    mx.export_function(collect, step, *given)
    return found


def fused(found: list[Operation]) -> list[Operation]:
    """Join neighbouring elementwise operations, as mx.compile runs them.

    An array that only the next of them reads is neither written nor read.
    """
    readers: dict[str, list[Operation]] = defaultdict(list)
    for operation in found:
        for name, _ in operation.inputs:
            readers[name].append(operation)
    inside = {
        name
        for operation in found
        if operation.name in ELEMENTWISE
        for name, _ in operation.outputs
        if all(reader.name in ELEMENTWISE for reader in readers[name])
    }
    maker = {n: o for o in found for n, _ in o.outputs if o.name in ELEMENTWISE}
    outside = []
    read: set[tuple[int, str]] = set()
    for operation in found:
        group = id(operation)
        if operation.name in ELEMENTWISE:
            group = _root(operation, maker)
        inputs = []
        for name, size in operation.inputs:
            own = name in maker and operation.name in ELEMENTWISE
            if name in inside or own or (group, name) in read:
                continue
            read.add((group, name))
            inputs.append((name, size))
        outputs = [(n, size) for n, size in operation.outputs if n not in inside]
        outside.append(Operation(operation.name, inputs, outputs))
    return outside


def _root(operation: Operation, maker: dict[str, Operation]) -> int:
    """Return the first of the elementwise operations that lead to this one."""
    while earlier := [maker[n] for n, _ in operation.inputs if n in maker]:
        operation = earlier[0]
    return id(operation)


def ours(path: Path, length: int):
    """Return a step of this package, and its inputs."""
    from mlx_dgemma.checkpoint.config import read_config
    from mlx_dgemma.diffusion.step import State, StepInputs, Stepper
    from mlx_dgemma.model.loading import load_model

    config = read_config(path)
    model = load_model(path, config)
    cache = model.make_cache()
    model.encode(mx.array([[1, 2, 3]]), cache)
    view = model.view(cache, length)
    stepper = Stepper(model, compiled=False)
    empty = mx.zeros((length,), mx.int32)
    numbers = mx.array([[0.6, 0.1, 1.0, 0.0, 0.9, 0.0]])
    inputs = StepInputs(mx.zeros((1, 2, 2), mx.uint32), *numbers.T)

    def step(canvas, signal):
        first = State.first(empty, config.hidden_size, model.dtype)
        state = first._replace(canvas=canvas, signal=signal)
        after, stats = stepper(state, view, inputs, None)
        return [*after, *stats]

    return step, (empty[None], mx.zeros((1, length, config.hidden_size)))


def theirs(path: Path, length: int):
    """Return a step of mlx-vlm's entropy-bound sampler, and its inputs."""
    from mlx_vlm.generate import diffusion
    from mlx_vlm.utils import load_model

    model = load_model(path)
    cache = model.make_cache()
    model.model.encoder(mx.array([[1, 2, 3]]), cache=cache)
    model._softcap = mx.tanh  # compiled into one operation there
    context = model.diffusion_prepare_self_conditioning()

    def step(canvas, signal):
        logits = model.diffusion_decoder_logits(
            canvas, cache=cache, self_conditioning=signal
        )
        processed = logits / 0.6
        argmax = mx.argmax(processed, axis=-1)
        sample = diffusion._diffusion_sample_canvas(processed, mx.int32, 1.0)
        entropy = diffusion._diffusion_token_entropy(processed)
        accepted = diffusion._diffusion_entropy_transfer_mask(entropy, 0.1)
        after = model.diffusion_self_conditioning(processed, context)
        return [argmax, mx.where(accepted, sample, canvas), after]

    width = model.config.text_config.hidden_size
    return step, (mx.zeros((1, length), mx.int32), mx.zeros((1, length, width)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    options = parser.parse_args()
    mx.disable_compile()  # a compiled operation hides its parts
    # a function with its own gradient cannot be exported; gelu touches no logits
    type(backends.current()).gelu = backends.Backend.gelu
    from mlx_dgemma.checkpoint.config import read_config

    config = read_config(options.checkpoint)
    length = config.canvas_length
    print("| of one (L, V) array | written | read | together | largest |")
    print("| --- | --- | --- | --- | --- |")
    for name, make in (("mlx-vlm", theirs), ("ours", ours)):
        found = operations(*make(options.checkpoint, length), config.vocab_size)
        _row(name, found, length * config.vocab_size)
        _row(f"{name}, elementwise fused", fused(found), length * config.vocab_size)


def _row(name: str, found: list[Operation], whole: int) -> None:
    written = [size for operation in found for _, size in operation.outputs]
    read = [size for operation in found for _, size in operation.inputs]
    print(
        f"| {name} | {sum(written) / whole:.1f} | {sum(read) / whole:.1f} | "
        f"{(sum(written) + sum(read)) / whole:.1f} | {max(written) / whole:.4f} |"
    )


if __name__ == "__main__":
    main()
