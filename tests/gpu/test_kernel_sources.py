"""The kernels' own text without a GPU: run by the CPU, and compiled as MLX does."""

import ctypes
import mmap
import os
import re
import shutil
from functools import partial
from pathlib import Path

import emulation
import mlx.core as mx
import numpy as np
import pytest
from kernels import CANDIDATES, CAP, EPS, on_gpu, vocabulary_tile

TILE, SANDWICH = CANDIDATES
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# candidate, size, dtype, bytes by which inputs and outputs begin off an alignment
CASES = [(each, each.odd, dtype, (0, 0)) for each in CANDIDATES for dtype in DTYPES]
CASES += [(TILE, (2, 2184), dtype, (0, 0)) for dtype in DTYPES]  # two blocks a row
CASES += [(SANDWICH, (1, 4104), mx.float16, (0, 0))]  # more than threads hold at once
CASES += [(SANDWICH, (2, 2816), mx.bfloat16, (0, 0))]
for off in (4, 0), (0, 4):
    CASES += [(TILE, (1, 128), dtype, off) for dtype in DTYPES]
    CASES += [(SANDWICH, (1, 2816), mx.bfloat16, off)]
REGISTERS = 65536  # that the threads of a thread block share


@pytest.fixture(scope="module")
def compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")


@pytest.fixture(scope="module")
def program(compiler, tmp_path_factory) -> emulation.Program:
    """All cases, compiled for the CPU."""
    made = emulation.Program()
    for candidate, size, dtype, _ in CASES:
        candidate.kernel(*candidate.inputs(size, 0, dtype), run=made.add)
    made.build(tmp_path_factory.mktemp("kernels"))
    return made


def doubles(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def exact_tile(logits, scale, highest) -> list[np.ndarray]:
    """`vocabulary_tile` in float64, of float64."""
    x = np.tanh(logits / CAP) * scale - highest
    e = np.exp(x)
    starts = np.arange(0, logits.shape[1], 64)
    return [e, np.add.reduceat(e, starts, axis=1), (e * x).sum(axis=1, keepdims=True)]


def exact_sandwich(h, dense, mixed, *rest) -> list[np.ndarray]:
    """`sandwich` in float64, of float64."""
    dense_weight, mixed_weight, both_weight, scalar = rest

    def normed(x, weight):
        square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(square + EPS) * weight

    both = normed(dense, dense_weight) + normed(mixed, mixed_weight)
    return [(h + normed(both, both_weight)) * scalar]


EXACT = {TILE.name: exact_tile, SANDWICH.name: exact_sandwich}


@pytest.mark.parametrize(
    ("candidate", "size", "dtype", "shift"),
    CASES,
    ids=[f"{each.name} {rows}x{w} {d} {i} {o}" for each, (rows, w), d, (i, o) in CASES],
)
def test_a_source_computes_what_its_twin_does(program, candidate, size, dtype, shift):
    given = candidate.inputs(size, 1, dtype)
    found = candidate.kernel(*given, run=partial(program.run, shift=shift))
    wanted = candidate.twin(*given)
    assert candidate.worst(given, found, wanted) <= 1
    assert candidate.equal(given, found, wanted)
    exact = EXACT[candidate.name](*map(doubles, given))
    for outputs in (found, wanted):
        triples = zip(outputs, exact, candidate.bounds(*given), strict=True)
        for output, right, bound in triples:
            assert (np.abs(doubles(output) - right) <= doubles(bound)).all()


def test_no_two_threads_race(compiler, tmp_path):
    program = emulation.Program(emulation.RACES)
    given = SANDWICH.inputs((2, 700), 6, mx.float16)  # of three warps
    SANDWICH.kernel(*given, run=program.add)
    program.build(tmp_path)
    found = SANDWICH.kernel(*given, run=program.run)
    assert SANDWICH.equal(given, found, SANDWICH.twin(*given))


def test_what_is_beyond_the_last_column_never_counts(program):
    """Where all logits are low, a logit of 0 would weigh more than float32 holds."""
    logits, scale = mx.full(TILE.odd, -40.0), mx.full((TILE.odd[0], 1), 300.0)
    highest = mx.tanh(logits[:, :1] / CAP) * scale
    e, sums, product = vocabulary_tile(logits, scale, highest, run=program.run)
    assert (np.abs(np.array(e) - 1) <= 1e-3).all()
    np.testing.assert_allclose(np.array(sums), [[64, 83 - 64]] * 5, rtol=1e-3)
    np.testing.assert_allclose(np.array(product), 0, atol=0.1)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
@pytest.mark.parametrize("columns", ["real", "odd"])
def test_a_launch_fills_its_thread_blocks(candidate, columns):
    """A grid in threads that is no multiple of a block would have shorter ones."""
    launches = []

    def look(source, **launch):
        launches.append(launch)
        return emulation.blank(**launch)

    for dtype in DTYPES:
        given = candidate.inputs((2, getattr(candidate, columns)[1]), 0, dtype)
        found, wanted = candidate.kernel(*given, run=look), candidate.twin(*given)
        of = [(a.shape, a.dtype) for a in found]
        assert of == [(a.shape, a.dtype) for a in wanted]
    for launch in launches:
        (x, *_), (threads, *_) = launch["grid"], launch["threadgroup"]
        assert x % threads == 0 and threads % 32 == 0 and threads <= 512


def test_a_layer_may_have_rows_and_positions(program):
    given = SANDWICH.inputs((4, SANDWICH.odd[1]), 5, mx.float32)
    folded = [a.reshape(2, 2, -1) if a.ndim == 2 else a for a in given]
    [flat] = SANDWICH.kernel(*given, run=program.run)
    [found] = SANDWICH.kernel(*folded, run=program.run)
    assert mx.array_equal(found, flat.reshape(2, 2, -1)).item()


def test_without_cuda_only_a_call_fails():
    if mx.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(RuntimeError, match="CUDA"):
        TILE.kernel(*TILE.inputs(TILE.odd, 0, mx.float32), run=on_gpu)


INCLUDES = "mlx/backend/cuda/device/"
# headers that MLX compiles into its library, and a line to know each by
EMBEDDED = {
    "utils.cuh": b"// This file must not include any host-only code",
    "complex.cuh": b"struct is_complex : cuda::std::false_type",
}


@pytest.fixture(scope="module")
def nvrtc() -> Path:
    """CUDA's run-time compiler, out of a wheel and beside the wheel of mlx-cuda."""
    library = Path(os.environ.get("NVRTC_LIBRARY", ""))
    if not library.is_file():
        pytest.skip("NVRTC_LIBRARY names no library")
    if not (library.parents[3] / "mlx/lib/libmlx.so").is_file():
        pytest.skip("no mlx-cuda beside NVRTC")
    return library


def headers(library: Path) -> dict[str, bytes]:
    """MLX's own, out of its library."""
    found = {}
    with (library.parents[3] / "mlx/lib/libmlx.so").open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, line in EMBEDDED.items():
            place = data.find(line)
            start, end = data.rfind(b"\0", 0, place) + 1, data.find(b"\0", place)
            found[INCLUDES + name] = data[start:end]
    return found


def compiled(library: Path, architecture: str, text: str) -> str:
    """What NVRTC says about a text, given the options that MLX gives."""
    compiler, site, given = ctypes.CDLL(str(library)), library.parents[3], {}
    given = headers(library)
    folders = [site / "mlx/include", site / "mlx/include/cccl"]
    options = [
        "--device-as-default-execution-space",
        f"--gpu-architecture={architecture}",
        *(f"--include-path={f}" for f in [*folders, library.parents[1] / "include"]),
        "--ptxas-options=-v",
    ]
    strings = ctypes.c_char_p * len(given)
    contents, names = strings(*given.values()), strings(*(n.encode() for n in given))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    about = text.encode(), b"kernels.cu", len(given), contents, names
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), *about) == 0
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = compiler.nvrtcCompileProgram(program, len(options), array)
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    return log.value.decode()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120a"])
def test_a_source_compiles_as_mlx_compiles_it(nvrtc, architecture):
    made = emulation.Program()
    for candidate in CANDIDATES:
        for columns in (candidate.real[1], candidate.odd[1], 5376, 9001):
            for dtype in DTYPES:
                given = candidate.inputs((1, columns), 0, dtype)
                candidate.kernel(*given, run=made.add)
    text = '#include "mlx/backend/cuda/device/utils.cuh"\n'
    text += "#include <cooperative_groups.h>\nnamespace mlx::core::cu {\n"
    for number, function in enumerate(made.known):
        text += f"namespace variant_{number} {{\n{function}}}\n"
    log = compiled(nvrtc, architecture, text + "}\n")
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(used) == len(made.known) == 15
    # a launch fails where its threads want more than there are
    assert max(used) * 512 <= REGISTERS
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    # only the widest rows, of three dtypes, are too long for registers
    assert re.findall(r"(\d+) bytes stack frame", log).count("0") == 12
