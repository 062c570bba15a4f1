"""Every operation of MLX that the package calls, once each, at the 26B's shapes.

An operation a device lacks raises by name here, not under a user. What comes back is
compared with numpy in float32, or with the operation's own definition.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
from parts import apart

from mlx_dgemma.checkpoint.quantize import Quantization

HALF, FULL = mx.bfloat16, mx.float32
# Relative error of a result. Roundings of inputs do not count: both sides start from
# the same arrays. bfloat16 keeps 8 bits. From quantised weights kernels may round the
# weights and even their sums to bfloat16 (MLX's on the CPU does, and errs by 2 %),
# while a wrong scale, bias or row errs by all there is.
ALLOWED = {FULL: 1e-5, HALF: 2**-7}
CODED = 2**-5
CODES = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)]
CODES += [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]


@dataclass(frozen=True)
class Sizes:
    """The shapes of a step; letters as in the package, and of widths:

    inner, expert   of the dense feed-forward and of an expert
    chunk           rows of the embedding looked at together
    """

    L: int = 256
    D: int = 2816
    inner: int = 2112
    expert: int = 704
    E: int = 128
    k: int = 8
    H: int = 16
    K: int = 8
    head: int = 256
    wide_head: int = 512
    wide_K: int = 2
    T: int = 1023
    chunk: int = 32768
    gathered: mx.Dtype = HALF  # of dense experts


TOY = Sizes(32, 256, 192, 64, 8, 2, 4, 2, 32, 64, 1, 50, 512, FULL)


@dataclass(frozen=True)
class Probe:
    """A call at its shape, and what it must return.

    call gives an array; exact gives what it should be, in numpy.
    """

    name: str
    call: Callable[[], mx.array]
    exact: Callable[[], np.ndarray]
    dtype: mx.Dtype = FULL
    coded: bool = False

    def run(self) -> dict:
        """Figures and verdict; an operation that is missing raises."""
        y = self.call()
        mx.eval(y)
        found = apart(y, self.exact().astype(np.float64))
        allowed = CODED if self.coded else ALLOWED[self.dtype]
        return found | {
            "shape": list(y.shape),
            "passed": bool(found["relative"] <= allowed),
        }


Family = Callable[[Sizes], Iterator[Probe]]


def families() -> dict[str, Family]:
    """Probes by what they are about; each is made when its turn comes."""
    found: dict[str, Family] = {
        "elementwise": _elementwise,
        "rows": _rows,
        "random": _random,
        "products": _products,
        "attention": _attention,
        "machinery": _machinery,
    }
    for mode, bits in CODES:
        q = Quantization.with_defaults(mode, bits, None)
        found[f"{mode} {bits} bit"] = partial(_coded, q=q)
    return found


def run(family: Family, s: Sizes) -> dict:
    """Every probe of a family: figures by name; what is missing says so."""
    found: dict[str, dict] = {}
    for probe in family(s):
        try:
            found[probe.name] = probe.run()
        except (RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            found[probe.name] = {"passed": False, "error": line}
    return {"probes": found, "passed": all(one["passed"] for one in found.values())}


def draw(*shape: int, seed: int = 0, dtype: mx.Dtype = FULL) -> mx.array:
    """Normal numbers."""
    return mx.random.normal(shape, dtype=dtype, key=mx.random.key(seed))


def plain(x: mx.array) -> np.ndarray:
    """The same numbers in numpy, float32."""
    return np.array(x.astype(FULL))


def _elementwise(s: Sizes) -> Iterator[Probe]:
    x = draw(s.L, s.chunk)
    half, n = x.astype(HALF), plain(x)
    table = {
        "exp": (lambda: mx.exp(x), lambda: np.exp(n)),
        "tanh": (lambda: mx.tanh(x), lambda: np.tanh(n)),
        "log": (lambda: mx.log(mx.square(x) + 1), lambda: np.log(n * n + 1)),
        "power": (lambda: mx.power(2.0, x), lambda: 2.0**n),
        "maximum": (
            lambda: mx.maximum(mx.minimum(x, 0.5), -0.5),
            lambda: n.clip(-0.5, 0.5),
        ),
        "clip": (lambda: mx.clip(x, -0.5, 0.5), lambda: n.clip(-0.5, 0.5)),
        "where": (lambda: mx.where(x > 0, x, 0), lambda: n.clip(0, None)),
        "add bfloat16": (
            lambda: half + mx.ones_like(half),
            lambda: plain(half) + 1,
            HALF,
        ),
    }
    for name, given in table.items():
        yield Probe(name, *given)


def _rows(s: Sizes) -> Iterator[Probe]:
    x = draw(s.L, s.chunk // 8)
    n = plain(x)
    ids = mx.array(np.random.default_rng(1).integers(0, s.E, (s.L, s.k)))
    some = draw(s.L, s.E)
    flat = ids.flatten()
    order = np.argsort(np.array(flat), kind="stable")
    table = {
        "sum": (lambda: mx.sum(x, axis=-1), lambda: n.sum(-1, dtype=np.float64)),
        "mean": (lambda: mx.mean(mx.abs(x), axis=-1), lambda: np.abs(n).mean(-1)),
        "max": (lambda: mx.max(x, axis=-1), lambda: n.max(-1)),
        "any": (lambda: mx.any(x > 3.5, axis=-1), lambda: (n > 3.5).any(-1)),
        "all": (lambda: mx.all(x < 3.5, axis=-1), lambda: (n < 3.5).all(-1)),
        "argmax": (lambda: mx.argmax(x, axis=-1), lambda: n.argmax(-1)),
        "cumsum": (
            lambda: mx.cumsum(mx.square(x), axis=-1),
            lambda: np.cumsum(n.astype(np.float64) ** 2, -1),
        ),
        "softmax": (lambda: mx.softmax(some, axis=-1), lambda: _softmax(plain(some))),
        "logsumexp": (
            lambda: mx.logsumexp(some, axis=-1),
            lambda: np.log(np.exp(plain(some)).sum(-1)),
        ),
        "argpartition": (
            lambda: mx.sum(
                mx.take_along_axis(some, mx.argpartition(-some, kth=s.k - 1), axis=-1)[
                    :, : s.k
                ],
                axis=-1,
            ),
            lambda: -np.sort(-plain(some), -1)[:, : s.k].sum(-1),
        ),
        "argsort": (
            lambda: flat[mx.argsort(flat)],
            lambda: np.array(flat)[order],
        ),
        "take_along_axis": (
            lambda: mx.take_along_axis(some, ids, axis=-1),
            lambda: np.take_along_axis(plain(some), np.array(ids), -1),
        ),
        "scatter": (lambda: _scattered(x), lambda: n[::-1]),
        "rms_norm": (
            lambda: mx.fast.rms_norm(some, None, 1e-6),
            lambda: plain(some) / np.sqrt((plain(some) ** 2).mean(-1, keepdims=True)),
        ),
    }
    for name, (call, exact) in table.items():
        yield Probe(name, call, exact)
    half = draw(s.L, s.D, dtype=HALF)
    size = np.sqrt((plain(half) ** 2).mean(-1, keepdims=True) + 1e-6)
    yield Probe(
        "rms_norm bfloat16",
        lambda: mx.fast.rms_norm(half, mx.full((s.D,), 0.5, dtype=HALF), 1e-6),
        lambda: plain(half) / size / 2,
        HALF,
    )


def _random(s: Sizes) -> Iterator[Probe]:
    key = mx.random.key(7)
    with mx.stream(mx.cpu):
        floats = mx.random.uniform(shape=(s.L,), key=key)
        whole = mx.random.randint(0, 262144, (s.L,), key=mx.random.split(key, 2)[0])
        mx.eval(floats, whole)
    yield Probe(  # the same draws as on the CPU: a seed means the same everywhere
        "uniform",
        lambda: mx.random.uniform(shape=(s.L,), key=key),
        lambda: np.array(floats),
    )
    yield Probe(
        "randint",
        lambda: mx.random.randint(0, 262144, (s.L,), key=mx.random.split(key, 2)[0]),
        lambda: np.array(whole),
    )


def _products(s: Sizes) -> Iterator[Probe]:
    for dtype in (FULL, HALF):
        x, w = draw(s.L, s.D, dtype=dtype), draw(s.chunk // 8, s.D, seed=1, dtype=dtype)
        yield Probe(
            f"matmul {dtype}".replace("mlx.core.", ""),
            lambda x=x, w=w: x @ w.T,
            lambda x=x, w=w: plain(x) @ plain(w).T,
            dtype,
        )
    rows, expert, order = _pairs(s, s.D)
    stored = draw(s.E, 2 * s.expert, s.D, seed=3, dtype=s.gathered) * s.D**-0.5
    rows, weight = rows.astype(s.gathered), stored.swapaxes(-1, -2)
    yield Probe(
        "gather_mm sorted",
        lambda: mx.gather_mm(rows, weight, rhs_indices=expert, sorted_indices=True),
        lambda: _by_expert(rows, stored, order),
        HALF,
    )
    yield Probe(
        "gather_mm gradient",
        lambda: mx.grad(
            lambda r: mx.sum(
                mx.gather_mm(r, weight, rhs_indices=expert, sorted_indices=True)
            )
        )(rows),
        lambda: plain(mx.sum(weight, axis=-1))[order][:, None],
        HALF,
    )


def _coded(s: Sizes, q: Quantization) -> Iterator[Probe]:
    """Products from quantised weights, in each of the shapes of a step."""
    spec = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}
    label = f"{q.mode} {q.bits} bit"

    def code(*shape: int) -> tuple[tuple[mx.array, ...], mx.array]:
        dense = draw(*shape, seed=4, dtype=HALF) * shape[-1] ** -0.5
        parts = tuple(mx.quantize(dense, **spec))
        # the CPU judges, but for all experts at once it would take a minute
        judge = mx.cpu if len(shape) == 2 else mx.default_device()
        return parts, mx.dequantize(*parts, **spec, dtype=FULL, stream=judge)

    x = draw(s.L, s.D, dtype=HALF)
    shapes = {"joined": (2 * s.inner, s.D), "alone": (s.inner, s.D)}
    shapes |= {"square": (s.D, s.D), "down": (s.D, s.inner)}
    for shape, (outputs, inputs) in shapes.items():
        parts, dense = code(outputs, inputs)
        given = x[:, :inputs]
        yield Probe(
            f"quantized_matmul {label} {shape}",
            lambda p=parts, g=given: mx.quantized_matmul(g, *p, transpose=True, **spec),
            lambda d=dense, g=given: plain(g) @ plain(d).T,
            HALF,
            coded=True,
        )
    yield Probe(
        f"dequantize {label}",
        lambda p=parts: mx.dequantize(*p, **spec, dtype=HALF),
        lambda d=dense: plain(d),
        HALF,
        coded=True,
    )
    wide = {"gate and up": (2 * s.expert, s.D), "down": (s.D, s.expert)}
    for shape, (outputs, inputs) in wide.items():
        parts, dense = code(s.E, outputs, inputs)
        rows, expert, order = _pairs(s, inputs)

        def gather(r, p=parts, e=expert):
            return mx.gather_qmm(
                r, *p, rhs_indices=e, transpose=True, sorted_indices=True, **spec
            )

        yield Probe(
            f"gather_qmm {label} {shape}",
            lambda r=rows, g=gather: g(r),
            lambda r=rows, d=dense, o=order: _by_expert(r, d, o),
            HALF,
            coded=True,
        )
    yield Probe(
        f"gather_qmm gradient {label}",
        lambda r=rows, g=gather: mx.grad(lambda a: mx.sum(g(a)))(r),
        lambda d=dense, o=order: plain(mx.sum(d, axis=1))[o][:, None],
        HALF,
        coded=True,
    )


def _attention(s: Sizes) -> Iterator[Probe]:
    for heads, width in ((s.K, s.head), (s.wide_K, s.wide_head)):
        keys = s.T + s.L
        q, k, v = (
            draw(1, n, t, width, seed=n, dtype=HALF) * width**-0.25
            for n, t in ((s.H, s.L), (heads, keys), (heads, keys))
        )
        causal = np.tril(np.ones((s.L, keys), bool), keys - s.L)
        holes = mx.array(np.arange(keys) >= 5)[None, None, None]
        masks = {"none": (None, np.True_), "causal": ("causal", causal)}
        masks["some"] = (holes, np.array(holes)[0, 0])
        for name, (mask, seen) in masks.items():
            yield Probe(
                f"attention {width} {name}",
                lambda q=q, k=k, v=v, m=mask: mx.fast.scaled_dot_product_attention(
                    q, k, v, scale=1.0, mask=m
                ),
                lambda q=q, k=k, v=v, m=seen: _attended(q, k, v, m),
                HALF,
            )


def _machinery(s: Sizes) -> Iterator[Probe]:
    """What holds the rest together: shapes, slices, order, traces, gradients."""
    x = draw(s.L, s.D)
    n = plain(x)

    def buffer() -> mx.array:
        y = mx.zeros((s.L + 8, s.D))
        y[4 : s.L + 4] = x
        return mx.concatenate([y[4 : s.L + 4], mx.full((1, s.D), 2.0)])

    double = mx.custom_function(lambda a: a * 2)
    double.vjp(lambda a, given, out: given * 3)
    table = {
        "slice update, concatenate": (
            buffer,
            lambda: np.concatenate([n, np.full((1, s.D), 2.0)]),
        ),
        "pad, stack, split": (
            lambda: mx.stack(mx.split(mx.pad(x, [(0, 0), (2, 2)]), 2, axis=-1)),
            lambda: np.stack(np.split(np.pad(n, [(0, 0), (2, 2)]), 2, axis=-1)),
        ),
        "view, broadcast": (
            lambda: mx.broadcast_to(mx.view(x, mx.uint32)[:, :1] & 255, (s.L, 3)),
            lambda: np.repeat(n.view(np.uint32)[:, :1] & 255, 3, axis=1),
        ),
        "depends": (lambda: mx.depends([x], [mx.zeros_like(x)])[0], lambda: n),
        "contiguous": (lambda: mx.contiguous(x.T), lambda: n.T),
        "compile": (
            lambda: mx.compile(lambda a: mx.tanh(a) * mx.arange(s.D) + 1)(x),
            lambda: np.tanh(n) * np.arange(s.D) + 1,
        ),
        "custom gradient": (
            lambda: mx.grad(lambda a: mx.sum(double(a)))(x),
            lambda: np.full_like(n, 3),
        ),
        "checkpoint, value_and_grad": (
            lambda: mx.value_and_grad(
                mx.checkpoint(lambda a: mx.sum(mx.square(a) * mx.stop_gradient(a)))
            )(x)[1],
            lambda: 2 * n * n,
        ),
    }
    for name, (call, exact) in table.items():
        yield Probe(name, call, exact)


def _pairs(s: Sizes, width: int) -> tuple[mx.array, mx.array, np.ndarray]:
    """One row per pair of token and expert, sorted, and the expert of each."""
    order = np.sort(np.random.default_rng(5).integers(0, s.E, s.L * s.k))
    rows = draw(len(order), 1, width, seed=6, dtype=HALF)
    return rows, mx.array(order.astype(np.uint32)), order


def _by_expert(rows: mx.array, weight: mx.array, order: np.ndarray) -> np.ndarray:
    """(R, 1, in) rows through the (E, out, in) weights of their experts."""
    x, y = plain(rows)[:, 0], []
    for expert in range(weight.shape[0]):
        y.append(x[order == expert] @ plain(weight[expert]).T)
    return np.concatenate(y)[:, None]


def _attended(q: mx.array, k: mx.array, v: mx.array, seen: np.ndarray) -> np.ndarray:
    queries, keys, values = plain(q)[0], plain(k)[0], plain(v)[0]
    groups = len(queries) // len(keys)
    y = []
    for head, query in enumerate(queries):
        scores = np.where(seen, query @ keys[head // groups].T, -np.inf)
        y.append(_softmax(scores) @ values[head // groups])
    return np.stack(y)[None]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _scattered(x: mx.array) -> mx.array:
    y = mx.zeros_like(x)
    y[mx.arange(len(x))[::-1]] = x
    return y
