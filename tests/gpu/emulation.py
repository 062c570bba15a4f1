"""Kernels without a GPU: the function MLX makes of a source, compiled for the CPU.

A `Program` runs the very text that a GPU gets, each CUDA thread a thread of the system;
`emulation.h` stands in for CUDA.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from kernels import Arrays, Source

HEADER = Path(__file__).with_name("emulation.h")
TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
# what reads or writes outside of an array, or between alignments, ends the program
BOUNDS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all"]
# what two threads touch with no barrier between them does as well
RACES = ["-fsanitize=thread"]
SECONDS = 60  # a thread that left early would let the others wait for ever


def function(source: Source, **launch: Any) -> str:
    """What MLX compiles for a launch, as in `custom_kernel.cpp` of its CUDA backend."""
    parameters = []
    for x, array in zip(source.inputs, launch["inputs"], strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {x}")
        if _asks_shape(source, x):
            parameters.append(f"const __grid_constant__ Shape {x}_shape")
    for x, dtype in zip(source.outputs, launch["output_dtypes"], strict=True):
        parameters.append(f"{TYPES[dtype]}* {x}")
    constants = "".join(
        f"  using {x} = {TYPES[value]};\n"
        if isinstance(value, mx.Dtype)
        else f"  constexpr int {x} = {value};\n"
        for x, value in launch["template"]
    )
    head = f"__global__ void custom_kernel_{source.name}({', '.join(parameters)})"
    return f"{head} {{\n{constants}{source.body}\n}}\n"


def caller(source: Source, **launch: Any) -> str:
    """A function of its arrays, inputs first, that calls the launch's."""
    dtypes = [array.dtype for array in launch["inputs"]] + launch["output_dtypes"]
    arguments = []
    for i, dtype in enumerate(dtypes):
        arguments.append(f"({TYPES[dtype]}*)arrays[{i}].start()")
        if i < len(source.inputs) and _asks_shape(source, source.inputs[i]):
            arguments.append(f"arrays[{i}].shape")
    call = f"custom_kernel_{source.name}({', '.join(arguments)})"
    return f"static void call(std::vector<Array>& arrays) {{\n  {call};\n}}\n"


def blank(**launch: Any) -> Arrays:
    """Outputs of a launch that did not happen."""
    given = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
    return [mx.zeros(shape, dtype) for shape, dtype in given]


class Program:
    """Launches that are compiled together: `add` them, `build`, then `run` any of them.

    A candidate's kernel takes `add` and `run` as its own `run`.
    """

    def __init__(self, checks: list[str] = BOUNDS) -> None:
        self.checks = checks
        self.known: dict[str, int] = {}
        self.parts: list[str] = []
        self.path = Path()

    def add(self, source: Source, **launch: Any) -> Arrays:
        text = function(source, **launch)
        if text not in self.known:
            number = self.known[text] = len(self.known)
            body = text + caller(source, **launch)
            self.parts.append(f"namespace variant_{number} {{\n{body}}}\n")
        return blank(**launch)

    def build(self, folder: Path) -> None:
        calls = ", ".join(f"variant_{number}::call" for number in self.known.values())
        main = "int main(int, char** arguments) { return run(kernels, arguments); }"
        table = f"static const Kernel kernels[] = {{{calls}}};\n{main}\n"
        text = "\n".join([f'#include "{HEADER}"', *self.parts, table])
        written, self.path = folder / "kernels.cpp", folder / "kernels"
        written.write_text(text)
        options = ["-std=c++20", "-pthread", *self.checks, "-o", str(self.path)]
        subprocess.run(["g++", *options, str(written)], check=True, timeout=SECONDS)

    def run(
        self, source: Source, shift: tuple[int, int] = (0, 0), **launch: Any
    ) -> Arrays:
        """shift: by how many bytes inputs and outputs begin off an alignment."""
        number = self.known[function(source, **launch)]
        (x, y, _), (threads, *_) = launch["grid"], launch["threadgroup"]
        words, data = [number, x, y, threads, *shift, len(launch["inputs"])], b""
        for array in launch["inputs"]:
            words += [array.nbytes, array.ndim, *array.shape]
            data += _bytes(array)
        outputs = blank(**launch)
        words += [array.nbytes for array in outputs]
        command = [str(self.path), *map(str, words)]
        # a sanitizer must be loaded first
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            check=True,
            timeout=SECONDS,
            env=environment,
        )
        found, start = [], 0
        for array in outputs:
            raw = np.frombuffer(done.stdout, np.uint8, array.nbytes, start)
            found.append(mx.array(raw).view(array.dtype).reshape(array.shape))
            start += array.nbytes
        return found


def _asks_shape(source: Source, name: str) -> bool:
    return f"{name}_shape" in source.body


def _bytes(array: mx.array) -> bytes:
    return np.array(array.flatten().view(mx.uint8)).tobytes()
