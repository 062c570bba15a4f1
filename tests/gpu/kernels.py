"""Kernels written by hand for CUDA, each beside the MLX operations it would replace.

Candidates: none is used by the package until a measurement on a GPU says that it wins.
A kernel is the body of a CUDA function, for `mx.fast.cuda_kernel`; its twin is what the
package does today; `worst` says how far the two are apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma import backends
from mlx_dgemma.model import vocab

CAP = 30.0  # of the logits of the 26B
EPS = 1e-6  # of its norms
EACH = 8  # columns a thread holds: 16 bytes of a 16-bit type
WARP = 32
ROUNDING = 2.0**-24  # of float32
Arrays = list[mx.array]


@dataclass(frozen=True)
class Source:
    """What MLX compiles, once its dtypes and template arguments are known."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str


# runs a source on what `mx.fast.cuda_kernel` calls inputs, template, grid and so on
Run = Callable[..., Arrays]


@cache
def _made(source: Source) -> Any:
    return mx.fast.cuda_kernel(
        name=source.name,
        input_names=source.inputs,
        output_names=source.outputs,
        source=source.body,
    )


def on_gpu(source: Source, **launch: Any) -> Arrays:
    """Run a source where MLX computes; raises RuntimeError without CUDA."""
    return _made(source)(**launch)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kernel and what it would replace. Sizes are (rows, columns).

    inputs    (size, seed, dtype) -> what kernel and twin take
    kernel    inputs -> outputs, on CUDA; `run` may be another than `on_gpu`
    twin      inputs -> outputs, in the operations of today
    bounds    inputs -> by how much each element of each output may differ, float32
    alike     share of the first output, at least, whose 16 bits are the same
    traffic   (size, bytes of a number) -> bytes the kernel must move
    """

    name: str
    replaces: str
    inputs: Callable[[tuple[int, int], int, mx.Dtype], Arrays]
    kernel: Callable[..., Arrays]
    twin: Callable[..., Arrays]
    bounds: Callable[..., Arrays]
    alike: float
    traffic: Callable[[tuple[int, int], int], int]
    real: tuple[int, int]  # as in a step of the 26B
    odd: tuple[int, int]  # of no round number

    def worst(self, given: Arrays, found: Arrays, wanted: Arrays) -> float:
        """The largest difference over what is allowed: up to 1 they are equal."""
        ratios = []
        for a, b, bound in zip(found, wanted, self.bounds(*given), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return float("inf")
            apart = mx.abs(a.astype(mx.float32) - b.astype(mx.float32))
            ratios.append(mx.where(mx.isnan(apart), mx.inf, apart / bound).max())
        return mx.stack(ratios).max().item()

    def equal(self, given: Arrays, found: Arrays, wanted: Arrays) -> bool:
        """Whether kernel and twin agree as far as rounding lets them."""
        same = mx.mean(found[0] == wanted[0]).item()
        exact = found[0].dtype == mx.float32 or same >= self.alike
        return exact and self.worst(given, found, wanted) <= 1


def _smallest(dtype: mx.Dtype) -> float:
    """What may be lost where numbers are too small for a dtype's precision."""
    return 2.0**-24 if dtype == mx.float16 else 2.0**-126


# One chunk of the vocabulary: each thread takes EACH neighbouring logits of a row, the
# threads of a block of tokens are neighbours in one warp.

VOCABULARY_TILE = """
  struct alignas(16) Held { T at[EACH]; };
  const int columns = logits_shape[1];
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * EACH;
  const size_t row = blockIdx.y;
  const float factor = scale[row], top = highest[row];
  const T* from = logits + row * columns + first;
  T* to = e + row * columns + first;
  // rows of an odd length begin anywhere
  const size_t places = reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to);
  const bool whole = first + EACH <= columns && places % 16 == 0;

  Held held;
  if (whole) {
    held = *reinterpret_cast<const Held*>(from);
  } else {
    for (int i = 0; i < EACH; ++i) {
      held.at[i] = first + i < columns ? from[i] : static_cast<T>(0.0f);
    }
  }

  float sum = 0.0f, product = 0.0f;
  for (int i = 0; i < EACH; ++i) {
    const float logit = static_cast<float>(held.at[i]);
    const float x = tanhf(logit * (1.0f / CAP)) * factor - top;
    float weight = expf(x);
    weight = first + i < columns ? weight : 0.0f;
    sum += weight;
    product += weight * x;
    held.at[i] = static_cast<T>(weight);
  }

  if (whole) {
    *reinterpret_cast<Held*>(to) = held;
  } else {
    for (int i = 0; i < EACH && first + i < columns; ++i) {
      to[i] = held.at[i];
    }
  }

  // all lanes take part, those beyond the last column with zeros
  for (int step = 1; step < BLOCK / EACH; step *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
    product += __shfl_xor_sync(0xffffffffu, product, step);
  }
  if (first % BLOCK == 0 && first < columns) {
    const size_t block = row * ((columns + BLOCK - 1) / BLOCK) + first / BLOCK;
    sums[block] = sum;
    products[block] = product;
  }
"""


def vocabulary_tile(
    logits: mx.array,
    scale: mx.array,
    highest: mx.array,
    softcap: float = CAP,
    run: Run = on_gpu,
) -> Arrays:
    """What `vocab.vocab_stats` wants of a chunk: e, its sums by block and Σ e · x.

    logits (N, C) raw; scale and highest (N, 1) float32. With x = tanh(logits / softcap)
    · scale - highest and e = exp(x): e (N, C) in the dtype of the logits, the sums of
    the float32 e (N, ceil(C / BLOCK)), and Σ e · x (N, 1).
    """
    (rows, columns), threads = logits.shape, 256
    constants = (
        f"\n  constexpr float CAP = {float(softcap)!r}f;"
        f"\n  constexpr int EACH = {EACH}, BLOCK = {vocab.BLOCK};"
    )
    blocks = (rows, -(-columns // vocab.BLOCK))
    e, sums, products = run(
        Source(
            "vocabulary_tile",
            ("logits", "scale", "highest"),
            ("e", "sums", "products"),
            constants + VOCABULARY_TILE,
        ),
        inputs=[logits, scale, highest],
        template=[("T", logits.dtype)],
        # in threads; a grid smaller than a thread block would leave lanes out
        grid=(-(-columns // (EACH * threads)) * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[logits.shape, blocks, blocks],
        output_dtypes=[logits.dtype, mx.float32, mx.float32],
    )
    return [e, sums, mx.sum(products, axis=-1, keepdims=True)]


def _tile_twin(logits: mx.array, scale: mx.array, highest: mx.array) -> Arrays:
    device = backends.current()
    x = device.softcap(logits.astype(mx.float32), CAP, scale) - highest
    e = device.exp(x)
    product = mx.sum(e * x, axis=-1, keepdims=True)
    return [e.astype(logits.dtype), vocab._block_sums(e), product]


def _tile_inputs(size: tuple[int, int], seed: int, dtype: mx.Dtype) -> Arrays:
    """Logits beyond the cap and far below it; every third row had a higher before."""
    rng, rows = np.random.default_rng(seed), size[0]
    logits = mx.array(rng.normal(size=size).astype(np.float32) * 12).astype(dtype)
    scale = mx.array((CAP / rng.uniform(0.4, 1.5, (rows, 1))).astype(np.float32))
    x = mx.tanh(logits.astype(mx.float32) / CAP) * scale
    before = mx.array(np.arange(rows)[:, None] % 3 == 1)
    return [logits, scale, mx.max(x, axis=-1, keepdims=True) + mx.where(before, 4, 0)]


def _tile_bounds(logits: mx.array, scale: mx.array, highest: mx.array) -> Arrays:
    """x of either way is off by 8 roundings of the scale and no more: 2 of the argument
    (which tanh dampens), 4 of tanh, of the product and the difference the rest; and exp
    by 4 of itself. That makes e relatively wrong, before it is rounded."""
    e, sums, _ = _tile_twin(logits.astype(mx.float32), scale, highest)
    x = mx.tanh(logits.astype(mx.float32) / CAP) * scale - highest
    off = 16 * ROUNDING * (scale + 1)
    order = 4 * ROUNDING  # of adding up, for each root of the number of terms
    product = mx.sum(e * off * (1 + mx.abs(x)), axis=-1, keepdims=True)
    total = mx.sum(e * mx.abs(x), axis=-1, keepdims=True)
    return [
        e * (off + mx.finfo(logits.dtype).eps) + _smallest(logits.dtype),
        sums * (off + order * vocab.BLOCK**0.5) + 2.0**-126,
        product + total * order * logits.shape[1] ** 0.5 + 2.0**-126,
    ]


def _tile_traffic(size: tuple[int, int], width: int) -> int:
    rows, columns = size
    return rows * (2 * columns * width + 2 * 4 * -(-columns // vocab.BLOCK))


# The end of a layer: a thread block takes a row and reads it once. Each thread holds
# EACH columns, PASSES times.

SANDWICH = """
  constexpr int WARPS = THREADS / 32, STRIDE = THREADS * EACH;
  constexpr int PASSES = (D + STRIDE - 1) / STRIDE;
  constexpr int UNROLLED = PASSES > 2 ? 1 : PASSES;  // registers for more there are not
  struct alignas(16) Held { T at[EACH]; };
  __shared__ float parts[3][WARPS];
  const size_t row = static_cast<size_t>(blockIdx.x) * D;

  // rows of an odd length begin anywhere
  const T* places[] = {
      h, dense, mixed, dense_weight, mixed_weight, both_weight, out};
  bool whole = D % EACH == 0;
  for (const T* place : places) {
    whole = whole && reinterpret_cast<size_t>(place) % 16 == 0;
  }

  auto eight = [](const T* from) { return *reinterpret_cast<const Held*>(from); };
  auto rest = [](const T* from, int count) {
    Held held;
    for (int i = 0; i < EACH; ++i) {
      held.at[i] = i < count ? from[i] : static_cast<T>(0.0f);
    }
    return held;
  };
  // over the thread block; each sum has parts of its own, so one barrier is enough
  auto mean = [&](float value, float* part) {
    for (int step = 16; step > 0; step /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    if (threadIdx.x % 32 == 0) {
      part[threadIdx.x / 32] = value;
    }
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < WARPS; ++i) {
      total += part[i];
    }
    return total / D;
  };
  // where MLX's operations round today
  auto rounded = [](float x) { return static_cast<float>(static_cast<T>(x)); };
  auto scaled = [&](float x, float rate, T by) {
    return rounded(static_cast<float>(by) * rounded(x * rate));
  };

  // everything is asked for before any of it is used, in one branch
  struct { Held h, dense, mixed, dense_weight, mixed_weight, both_weight; } of[PASSES];
  const float by = static_cast<float>(scalar[0]);
#pragma unroll UNROLLED
  for (int pass = 0; pass < PASSES; ++pass) {
    const int first = pass * STRIDE + threadIdx.x * EACH;
    if (whole && first < D) {
      of[pass].dense = eight(dense + row + first);
      of[pass].mixed = eight(mixed + row + first);
      of[pass].dense_weight = eight(dense_weight + first);
      of[pass].mixed_weight = eight(mixed_weight + first);
      of[pass].both_weight = eight(both_weight + first);
      of[pass].h = eight(h + row + first);
    } else {
      of[pass].dense = rest(dense + row + first, D - first);
      of[pass].mixed = rest(mixed + row + first, D - first);
      of[pass].dense_weight = rest(dense_weight + first, D - first);
      of[pass].mixed_weight = rest(mixed_weight + first, D - first);
      of[pass].both_weight = rest(both_weight + first, D - first);
      of[pass].h = rest(h + row + first, D - first);
    }
  }

  float dense_square = 0.0f, mixed_square = 0.0f, both_square = 0.0f;
#pragma unroll UNROLLED
  for (int pass = 0; pass < PASSES; ++pass) {
    for (int i = 0; i < EACH; ++i) {
      const float a = static_cast<float>(of[pass].dense.at[i]);
      const float b = static_cast<float>(of[pass].mixed.at[i]);
      dense_square += a * a;
      mixed_square += b * b;
    }
  }

  const float dense_rate = rsqrtf(mean(dense_square, parts[0]) + EPS);
  const float mixed_rate = rsqrtf(mean(mixed_square, parts[1]) + EPS);
  float both[PASSES][EACH];
#pragma unroll UNROLLED
  for (int pass = 0; pass < PASSES; ++pass) {
    for (int i = 0; i < EACH; ++i) {
      const float a = static_cast<float>(of[pass].dense.at[i]);
      const float b = static_cast<float>(of[pass].mixed.at[i]);
      both[pass][i] = rounded(
          scaled(a, dense_rate, of[pass].dense_weight.at[i]) +
          scaled(b, mixed_rate, of[pass].mixed_weight.at[i]));
      both_square += both[pass][i] * both[pass][i];
    }
  }

  const float both_rate = rsqrtf(mean(both_square, parts[2]) + EPS);
#pragma unroll UNROLLED
  for (int pass = 0; pass < PASSES; ++pass) {
    const int first = pass * STRIDE + threadIdx.x * EACH;
    T* to = out + row + first;
    Held held;
    for (int i = 0; i < EACH; ++i) {
      const float x = scaled(both[pass][i], both_rate, of[pass].both_weight.at[i]);
      const float sum = rounded(static_cast<float>(of[pass].h.at[i]) + x);
      held.at[i] = static_cast<T>(sum * by);
    }
    if (whole && first < D) {
      *reinterpret_cast<Held*>(to) = held;
    } else {
      for (int i = 0; i < EACH && first + i < D; ++i) {
        to[i] = held.at[i];
      }
    }
  }
"""


def sandwich(
    h: mx.array,
    dense: mx.array,
    mixed: mx.array,
    dense_weight: mx.array,
    mixed_weight: mx.array,
    both_weight: mx.array,
    scalar: mx.array,
    eps: float = EPS,
    run: Run = on_gpu,
) -> Arrays:
    """What `Layer` does behind its feed-forwards, all of one dtype.

    h, dense and mixed (…, D), weights (D,), scalar (1,). With rms(x, w) the norm of x
    times w: (h + rms(rms(dense, …) + rms(mixed, …), …)) · scalar, (…, D).
    """
    width = h.shape[-1]
    warps = -(-width // (EACH * WARP))
    threads = WARP * min(warps, 16)  # beyond, a thread takes several turns
    constants = (
        f"\n  constexpr float EPS = {float(eps)!r}f;\n  constexpr int EACH = {EACH};"
    )
    weights = ("dense_weight", "mixed_weight", "both_weight")
    return run(
        Source(
            "sandwich",
            ("h", "dense", "mixed", *weights, "scalar"),
            ("out",),
            constants + SANDWICH,
        ),
        inputs=[h, dense, mixed, dense_weight, mixed_weight, both_weight, scalar],
        template=[("T", h.dtype), ("D", width), ("THREADS", threads)],
        grid=(h.size // width * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[h.shape],
        output_dtypes=[h.dtype],
    )


def _sandwich_twin(
    h: mx.array,
    dense: mx.array,
    mixed: mx.array,
    dense_weight: mx.array,
    mixed_weight: mx.array,
    both_weight: mx.array,
    scalar: mx.array,
) -> Arrays:
    both = mx.fast.rms_norm(dense, dense_weight, EPS)
    both = both + mx.fast.rms_norm(mixed, mixed_weight, EPS)
    return [(h + mx.fast.rms_norm(both, both_weight, EPS)) * scalar]


def _sandwich_inputs(size: tuple[int, int], seed: int, dtype: mx.Dtype) -> Arrays:
    """Rows of common, of small and of tiny numbers: in the last two eps is seen."""
    rng, (rows, width) = np.random.default_rng(seed), size
    small = np.array([1, 1e-3, 3e-6])[np.arange(rows) % 3, None]
    h, dense, mixed = (rng.normal(size=size) * by for by in (2, 3 * small, small))
    weights = 1 + rng.normal(size=(3, width)) / 3
    arrays = [h, dense, mixed, *weights, np.array([0.7])]
    return [mx.array(a.astype(np.float32)).astype(dtype) for a in arrays]


def _sandwich_bounds(
    h: mx.array,
    dense: mx.array,
    mixed: mx.array,
    dense_weight: mx.array,
    mixed_weight: mx.array,
    both_weight: mx.array,
    scalar: mx.array,
) -> Arrays:
    """Sums of another order make another rate, and so a rounding may fall the other
    way: by one unit in the last place of whatever is rounded, carried to the end."""
    unit = mx.finfo(h.dtype).eps + ROUNDING * h.shape[-1] ** 0.5
    least = _smallest(h.dtype) / unit
    h, dense, mixed, dense_weight, mixed_weight, both_weight, scalar = (
        a.astype(mx.float32)
        for a in (h, dense, mixed, dense_weight, mixed_weight, both_weight, scalar)
    )
    dense = mx.fast.rms_norm(dense, dense_weight, EPS)
    mixed = mx.fast.rms_norm(mixed, mixed_weight, EPS)
    rate = mx.rsqrt(mx.mean((dense + mixed) ** 2, axis=-1, keepdims=True) + EPS)
    # in units: each addend 2 and their sum 1, times the rate 1, times the weight 1
    normed = mx.abs(both_weight) * rate * (mx.abs(dense) + mx.abs(mixed) + least)
    # added to h 1, times the scalar 1
    return [unit * mx.abs(scalar) * (7 * normed + 2 * mx.abs(h))]


def _sandwich_traffic(size: tuple[int, int], width: int) -> int:
    return 4 * size[0] * size[1] * width


CANDIDATES = [
    Candidate(
        name="vocabulary tile",
        replaces="vocab._sweep, between the two products of a chunk",
        inputs=_tile_inputs,
        kernel=vocabulary_tile,
        twin=_tile_twin,
        bounds=_tile_bounds,
        alike=0.8,  # e may be off by 7e-5 of itself, and half has 5e-4 between numbers
        traffic=_tile_traffic,
        real=(256, 32768),
        odd=(5, 83),
    ),
    Candidate(
        name="sandwich",
        replaces="Layer.__call__, behind its feed-forwards",
        inputs=_sandwich_inputs,
        kernel=sandwich,
        twin=_sandwich_twin,
        bounds=_sandwich_bounds,
        alike=0.99,  # only what lies within 1e-6 of a tie is rounded the other way
        traffic=_sandwich_traffic,
        real=(256, 2816),
        odd=(5, 83),
    ),
]
