"""Which device is chosen on machines that are made up, and each device's operations."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from devices import using

from mlx_dgemma import backends, installation
from mlx_dgemma.backends import BACKENDS, ENVIRONMENT, cpu
from mlx_dgemma.backends.cuda import PTX_CACHE
from mlx_dgemma.errors import BackendError, SlowBlasWarning

GB = 1 << 30
TF32 = "MLX_ENABLE_TF32"
CPU = {"architecture": "x86_64", "device_name": "AMD EPYC"}
MAC = {
    "device_name": "Apple M4 Max",
    "max_recommended_working_set_size": 48 * GB,
    "memory_size": 64 * GB,
}
H100 = {
    "device_name": "NVIDIA H100 80GB HBM3",
    "architecture": "sm_90",
    "compute_capability_major": 9,
    "compute_capability_minor": 0,
    "free_memory": 78 * GB,
    "total_memory": 80 * GB,
}
OLD = H100 | {"compute_capability_major": 6, "compute_capability_minor": 1}
TURING = H100 | {"compute_capability_major": 7, "compute_capability_minor": 5}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine("cuda", H100)`: this process as it would be there, nothing chosen."""
    for name in (ENVIRONMENT, PTX_CACHE, TF32):
        monkeypatch.setenv(name, "")  # or what is set later would outlive the test
        monkeypatch.delenv(name)
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_current", None)
    monkeypatch.setattr(mx, "__file__", str(tmp_path / "packages" / "mlx" / "core.so"))

    def pretend(built, info, *, visible=1, libraries=("mlx-cuda-13",), default=None):
        devices = [mx.Device(default or (mx.cpu if built == "cpu" else mx.gpu))]

        def version(package: str) -> str:
            if package not in libraries:
                raise PackageNotFoundError(package)
            return mx.__version__

        monkeypatch.setattr(installation, "version", version)
        monkeypatch.setattr(mx.metal, "is_available", lambda: built == "metal")
        monkeypatch.setattr(mx.cuda, "is_available", lambda: built == "cuda")
        monkeypatch.setattr(mx, "device_count", lambda kind: visible)
        monkeypatch.setattr(
            mx, "device_info", lambda d: CPU if d.type == mx.DeviceType.cpu else info
        )
        monkeypatch.setattr(mx, "default_device", lambda: devices[-1])
        monkeypatch.setattr(mx, "set_default_device", devices.append)
        return devices

    return pretend


@pytest.mark.parametrize(
    ("name", "info"), [("cpu", CPU), ("metal", MAC), ("cuda", H100)]
)
def test_mlx_default_device_is_chosen(machine, name, info):
    devices = machine(name, info)
    assert backends.current() is backends.current() is BACKENDS[name]
    assert len(devices) == 2 and devices[-1].type == BACKENDS[name].kind
    shown = backends.current().description()
    assert shown.startswith("CPU (") if name == "cpu" else shown == info["device_name"]
    assert os.environ.get(TF32) == (None if name == "cpu" else "0")


def test_caller_before_environment_before_default(machine, monkeypatch):
    machine("metal", MAC, default=mx.cpu)  # a GPU that is not the default
    assert backends.current().name == "cpu"
    devices = machine("cuda", H100)
    monkeypatch.setenv(ENVIRONMENT, "")
    assert backends.choose().name == "cuda"
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert backends.current().name == "cuda"  # chosen once
    assert backends.choose().name == backends.current().name == "cpu"
    assert devices[-1].type == mx.DeviceType.cpu
    with pytest.raises(KeyError), using(BACKENDS["cuda"]) as other:
        assert backends.current() is other
        raise KeyError
    assert devices[-1].type == mx.DeviceType.cpu
    assert backends.current().name == "cpu"


@pytest.mark.parametrize(
    ("built", "info", "options", "name", "phrases"),
    [
        ("cpu", CPU, {}, "gpu", "asked for by {by} is 'gpu'; known: cpu, metal, cuda"),
        ("cpu", CPU, {}, "metal", "metal: this MLX has no Metal"),
        ("cpu", CPU, {}, "cuda", "cuda: this MLX was installed without CUDA"),
        ("metal", MAC, {"visible": 0}, "metal", "metal: no Metal device"),
        ("cuda", H100, {"visible": 0}, "cuda", "cuda: no NVIDIA GPU is visible"),
        ("cuda", OLD, {}, "cuda", "has compute capability 6.1, MLX needs 7.5"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(
    machine, monkeypatch, built, info, options, name, phrases
):
    devices = machine(built, info, **options)
    with pytest.raises(BackendError) as caught:
        backends.choose(name)
    assert phrases.format(by="the caller") in str(caught.value)
    monkeypatch.setenv(ENVIRONMENT, name)
    with pytest.raises(BackendError) as caught:
        backends.choose()
    assert phrases.format(by=f"${ENVIRONMENT}") in str(caught.value)
    assert "\n" not in str(caught.value) and len(devices) == 1
    assert backends._current is None
    if built != "cpu":  # then it is the default as well
        monkeypatch.delenv(ENVIRONMENT)
        with pytest.raises(BackendError, match=f"{ENVIRONMENT}=cpu computes on the CP"):
            backends.current()


def test_several_libraries_are_warned_about(machine):
    machine("cuda", H100, libraries=("mlx-cpu", "mlx-cuda-13"))
    message = "mlx-cpu and mlx-cuda-13 are installed"
    with pytest.warns(UserWarning, match=message) as one:
        backends.current()
        backends.current()
    assert len(one) == 1


def test_turing_is_the_oldest_gpu(machine, monkeypatch, tmp_path):
    machine("cuda", TURING | {"compute_capability_minor": 2})
    assert "capability 7.2, MLX needs 7.5" in str(BACKENDS["cuda"].missing())
    machine("cuda", TURING)
    assert BACKENDS["cuda"].missing() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert str(BACKENDS["cuda"].missing()).startswith("CUDA's headers are missing")


def test_memory_is_what_the_device_says(machine):
    machine("metal", MAC)
    assert backends.current().memory() == 48 * GB
    machine("metal", {"memory_size": 64 * GB})
    assert backends.current().memory() == 64 * GB
    machine("cuda", H100)
    assert backends.choose("cuda").memory() == 80 * GB
    machine("cuda", {})
    assert backends.current().memory() is None
    assert (backends.choose("cpu").memory() or 0) > GB


def test_kernels_outlive_the_process(machine, monkeypatch, tmp_path):
    folders = set()
    for info, library in ((H100, "13"), (H100, "12"), (CPU, "12")):
        monkeypatch.delenv(PTX_CACHE, raising=False)
        machine("cuda", info, libraries=(f"mlx-cuda-{library}", "mlx"))
        backends.choose("cuda")
        folders.add(Path(os.environ[PTX_CACHE]))
    assert len(folders) == 3  # by MLX, its library and the architecture
    assert all(f.is_dir() and f.is_relative_to(tmp_path / "cache") for f in folders)
    for place in ("/somewhere", ""):
        monkeypatch.setenv(PTX_CACHE, place)
        backends.choose("cuda")
        assert os.environ[PTX_CACHE] == place
    monkeypatch.delenv(PTX_CACHE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    backends.choose("cuda")
    assert PTX_CACHE not in os.environ  # no place to write to


def test_a_slow_blas_is_warned_about(machine, monkeypatch, tmp_path):
    machine("cpu", CPU)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cpu, "MAPPED_FILES", tmp_path / "maps")
    for fast in ("openblas-pthread/libopenblasp-r0.so", "libmkl_rt.so.2", "libblis.so"):
        (tmp_path / "maps").write_text(f"/usr/lib/{fast}")
        assert cpu.slow_blas() is None
    slow = (
        "/x/mlx_cpu.libs/libblas-bd8a282c.so.3\n/x/numpy.libs/libscipy_openblas64_.so"
    )
    (tmp_path / "maps").write_text(slow)
    with pytest.warns(SlowBlasWarning, match=r"LD_PRELOAD=/usr/lib/\S+/libblas\.so\.3"):
        backends.current()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert "install libopenblas0-pthread and run with" in str(cpu.slow_blas())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu.slow_blas() is None


# Operations, against float64 numpy

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
WIDE = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-120, 120, 2401)])
TAIL = np.logspace(-8, 4, 200)
WIDE = np.concatenate([WIDE, TAIL, -TAIL, [0.0, -0.0]])


def doubles(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def inputs(dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """WIDE in `dtype`, and what that rounds it to in float64."""
    x = mx.array(WIDE.astype(np.float32)).astype(dtype)
    return x, doubles(x)


@pytest.fixture(params=["cpu", "gpu"])
def device(request):
    """Both devices' operations, whatever computes them."""
    if request.param == "gpu":
        request.getfixturevalue("as_gpu")
    return backends.current()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_is_right_to_its_last_digits(dtype):
    x, exact = inputs(dtype)
    with np.errstate(over="ignore"):
        wanted = np.exp(exact)
    most, least = mx.finfo(dtype).max, 2.0 ** (-14 if dtype == mx.float16 else -126)
    found = cpu.exp(x)
    assert found.dtype == dtype
    y = doubles(found)
    assert np.isinf(y[wanted > most * 1.1]).all()
    assert (y[wanted < least] <= least).all() and not np.isnan(y).any()
    normal = (wanted >= least) & (wanted < most * 0.9)
    off = np.abs(y[normal] / wanted[normal] - 1)
    # rounding the result, and an argument that float32 holds to 2**-24 of itself
    assert (off <= mx.finfo(dtype).eps + 2**-24 * np.abs(exact[normal])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_right_to_its_last_digits(dtype, device):
    x, exact = inputs(dtype)
    inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    found, wanted = device.gelu(x), exact / 2 * (1 + np.tanh(inner))
    assert found.dtype == dtype
    bound = 2 * mx.finfo(dtype).eps * (1 + np.abs(exact))
    assert (np.abs(doubles(found) - wanted) <= bound).all()


def test_gelu_has_its_gradient():
    x = mx.array(np.linspace(-30, 30, 601, dtype=np.float32))
    found, wanted = (
        mx.grad(lambda x, device=d: device.gelu(x).sum())(x)
        for d in (backends.CPU(), backends.Metal())
    )
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=2e-6)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_is_a_scaled_tanh(cap, device):
    x, exact = inputs(mx.float32)
    scale = np.array([[0.3], [cap], [75.0], [3000.0]], np.float32)
    found = np.array(device.softcap(x[None], cap, mx.array(scale)))
    wanted = np.tanh(exact / cap) * scale
    assert (np.abs(found - wanted) <= 4 * 2**-24 * scale).all()
    assert (np.abs(found) <= scale).all()


B, H, K, T, S, W = 2, 6, 2, 9, 20, 16
RNG = np.random.default_rng(3)
SEEN = RNG.random((B, 1, T, S)) < 0.6
SEEN[..., 3] = True  # no query without a key
MASKS = {"none": None, "(T, S)": SEEN[0, 0], "(B, 1, T, S)": SEEN}
MASKS |= {"(B, 1, 1, S)": SEEN[:, :, :1], "causal": "causal"}


def attention(queries, keys, values, mask) -> np.ndarray:
    """Head by head in float64; H // K query heads share a key head."""
    y = np.zeros((B, H, T, W))
    if isinstance(mask, str):
        mask = np.tril(np.ones((T, S), bool), S - T)
    seen = np.broadcast_to(True if mask is None else mask, (B, H, T, S))
    for row, head in np.ndindex(B, H):
        shared = head // (H // K)
        scores = queries[row, head] @ keys[row, shared].T
        scores = np.where(seen[row, head], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y[row, head] = weights @ values[row, shared]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attention_errs_no_more_than_mlx_does(name, dtype):
    rng = np.random.default_rng(3)
    for size in (0.3, 3.0):
        q, k, v = (
            mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
            for shape in ((B, H, T, W), (B, K, S, W), (B, K, S, W))
        )
        q, given = q * size, MASKS[name]
        mask = mx.array(given) if isinstance(given, np.ndarray) else given
        exact = attention(doubles(q), doubles(k), doubles(v), given)
        ours = BACKENDS["cpu"].attend(q, k, v, mask)
        mlx = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
        assert ours.dtype == dtype
        error, allowed = (np.abs(doubles(y) - exact).max() for y in (ours, mlx))
        assert error <= 4 * allowed
        assert allowed < 0.1


def test_attention_to_one_key_among_huge_scores_is_its_value():
    keys = mx.array(np.eye(4, dtype=np.float32))[None, None] * 3e4
    values = mx.arange(16).reshape(1, 1, 4, 4).astype(mx.float32)
    queries = mx.broadcast_to(keys / 10, (1, 2, 4, 4))
    y = np.array(BACKENDS["cpu"].attend(queries, keys, values, None))
    np.testing.assert_array_equal(y, np.broadcast_to(np.array(values), (1, 2, 4, 4)))


def test_a_model_computes_the_same_as_on_a_gpu(tiny_model, request):
    model, _ = tiny_model
    prompt = mx.array(RNG.integers(0, 32, (1, 40)).astype(np.int32))

    def logits() -> np.ndarray:
        cache = model.make_cache()
        model.encode(prompt, cache)
        return np.array(model.denoise(prompt[:, :16], cache))

    here = logits()
    request.getfixturevalue("as_gpu")
    np.testing.assert_allclose(logits(), here, atol=2e-5)


def test_a_process_forked_from_one_with_a_device_is_refused():
    """It has none of MLX's threads: the first computation would never end."""
    code = """
        import os
        from mlx_dgemma import backends, errors
        def forked():
            if not os.fork():
                try:
                    print(backends.current().name, flush=True)
                except errors.BackendError as error:
                    print(error, flush=True)
                os._exit(0)
            os.wait()
        forked()
        backends.choose("cpu")
        forked()
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    before, after = ended.stdout.splitlines()
    assert before == backends.current().name and "forked" in after
