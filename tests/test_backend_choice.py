"""Which device is chosen, when and why, on machines that are made up."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_dgemma.backends.interface import Backend

from mlx_dgemma import backends, installation
from mlx_dgemma.adapters.lora import LoRA
from mlx_dgemma.backends import BACKENDS, ENVIRONMENT, Choices, Limits
from mlx_dgemma.backends.cuda import PTX_CACHE
from mlx_dgemma.errors import BackendError, TrainingError
from mlx_dgemma.training import memory
from mlx_dgemma.training.settings import TrainSettings

GB = 1 << 30
TF32 = "MLX_ENABLE_TF32"
CPU = {"architecture": "x86_64", "device_name": "AMD EPYC"}
MAC = {
    "device_name": "Apple M4 Max",
    "architecture": "applegpu_g16s",
    "max_buffer_length": 36 * GB,
    "max_recommended_working_set_size": 48 * GB,
    "memory_size": 64 * GB,
    "resource_limit": 499000,
}
H100 = {
    "device_name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-8d4c",
    "architecture": "sm_90",
    "pci_bus_id": "0000:04:00.0",
    "compute_capability_major": 9,
    "compute_capability_minor": 0,
    "free_memory": 78 * GB,
    "total_memory": 80 * GB,
}
RTX = H100 | {
    "device_name": "NVIDIA GeForce RTX 3060",
    "architecture": "sm_86",
    "compute_capability_major": 8,
    "compute_capability_minor": 6,
    "free_memory": 11 * GB,
    "total_memory": 12 * GB,
}


def capable(major: int, minor: int) -> dict[str, str | int]:
    numbers = {"compute_capability_major": major, "compute_capability_minor": minor}
    return H100 | numbers | {"device_name": "NVIDIA Test"}


def without(info: dict[str, str | int], *names: str) -> dict[str, str | int]:
    return {name: value for name, value in info.items() if name not in names}


@dataclass
class Machine:
    """What MLX was built for, says of its GPU, and was told to do."""

    built: str = "cpu"
    gpu: dict[str, str | int] = field(default_factory=dict)
    visible: int = 1
    libraries: tuple[str, ...] = ("mlx-cuda-13",)
    default: mx.Device = field(default_factory=lambda: mx.Device(mx.cpu))
    wired: list[int] = field(default_factory=list)

    def version(self, package: str) -> str:
        if package not in self.libraries:
            raise PackageNotFoundError(package)
        return mx.__version__

    def set_default(self, device: mx.Device) -> None:
        self.default = device


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine("cuda", H100)`: this process as it would be there, nothing chosen."""
    for name in (ENVIRONMENT, PTX_CACHE, TF32):
        monkeypatch.setenv(name, "")  # or what is set later would outlive the test
        monkeypatch.delenv(name)
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setattr(installation, "driver_accepts", lambda *library: 13000)
    monkeypatch.setattr(mx, "__file__", str(tmp_path / "packages" / "mlx" / "core.so"))

    def pretend(built: str = "cpu", gpu: dict[str, str | int] = CPU, **more) -> Machine:
        m = Machine(built, gpu, **more)
        if built != "cpu" and "default" not in more:
            m.default = mx.Device(mx.gpu)
        monkeypatch.setattr(sys, "platform", "darwin" if built == "metal" else "linux")
        monkeypatch.setattr(installation, "version", m.version)
        monkeypatch.setattr(mx.metal, "is_available", lambda: built == "metal")
        monkeypatch.setattr(mx.cuda, "is_available", lambda: built == "cuda")
        monkeypatch.setattr(mx, "device_count", lambda kind: m.visible)
        monkeypatch.setattr(
            mx, "device_info", lambda d: CPU if d.type == mx.DeviceType.cpu else m.gpu
        )
        monkeypatch.setattr(mx, "default_device", lambda: m.default)
        monkeypatch.setattr(mx, "set_default_device", m.set_default)
        monkeypatch.setattr(mx, "set_wired_limit", m.wired.append)
        return m

    return pretend


@pytest.fixture
def environment(monkeypatch):
    """`environment("cpu")`: $MLX_DGEMMA_BACKEND says so."""
    return lambda name: monkeypatch.setenv(ENVIRONMENT, name)


MACHINES = [("cpu", CPU), ("metal", MAC), ("cuda", H100), ("cuda", RTX)]


@pytest.mark.parametrize(("name", "info"), MACHINES)
def test_the_device_mlx_computes_on_is_the_one(machine, name, info):
    pretended = machine(name, info)
    found = backends.chosen()
    assert found.backend is backends.current() is BACKENDS[name]
    assert found.backend.name == name and pretended.default.type == found.backend.kind
    assert not found.asked and "by default" in found.reason
    shown = found.backend.description()
    assert shown.startswith("CPU (") if name == "cpu" else shown == info["device_name"]


def test_a_gpu_that_mlx_was_told_to_leave_alone_is_not_chosen(machine):
    machine("metal", MAC, default=mx.Device(mx.cpu))
    assert backends.current().name == "cpu"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_environment_names_a_device(machine, environment, name):
    pretended = machine("cuda", H100)
    environment(name)
    found = backends.chosen()
    assert (found.backend.name, found.asked) == (name, True)
    assert f"${ENVIRONMENT}" in found.reason
    assert pretended.default.type == found.backend.kind


def test_an_empty_variable_names_none(machine, environment):
    machine("metal", MAC)
    environment("")
    assert (backends.current().name, backends.chosen().asked) == ("metal", False)


def test_the_caller_is_heard_before_the_environment(machine, environment):
    machine("cuda", H100)
    environment("cuda")
    found = backends.choose("cpu")
    assert found is backends.chosen() and found.asked
    assert (found.backend.name, found.reason) == ("cpu", "asked for by the caller")


KNOWN = "known: cpu, metal, cuda"
WAY_OUT = f"; {ENVIRONMENT}=cpu computes on the CPU"
REFUSALS = {
    "unknown": ("cpu", CPU, {}, "gpu", ("by the caller is 'gpu'", KNOWN)),
    "no Metal": ("cpu", CPU, {}, "metal", ("metal: ", "Apple silicon")),
    "no CUDA": (
        *("cpu", CPU, {"libraries": ("mlx-cpu",)}, "cuda"),
        ("cuda: ", "without CUDA", "'mlx-dgemma[cuda13]'"),
    ),
    "hidden Metal": (
        "metal",
        MAC,
        {"visible": 0},
        "metal",
        ("metal: no Metal device",),
    ),
    "hidden CUDA": ("cuda", H100, {"visible": 0}, "cuda", ("cuda: no NVIDIA GPU",)),
    "too old": (
        *("cuda", capable(6, 1), {}, "cuda"),
        ("cuda: NVIDIA Test has", "capability 6.1", "7.5"),
    ),
}


@pytest.mark.parametrize("by", ["caller", "environment"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_was_asked_for_is_refused_in_one_line(machine, environment, case, by):
    built, info, more, name, told = REFUSALS[case]
    pretended = machine(built, info, **more)
    before = pretended.default
    if by == "environment":
        environment(name)
        told = (told[0].replace("the caller", f"${ENVIRONMENT}"), *told[1:])
    with pytest.raises(BackendError) as caught:
        backends.choose(name if by == "caller" else None)
    message = str(caught.value)
    assert all(words in message for words in told) and "\n" not in message
    assert WAY_OUT not in message
    assert backends._chosen is None and pretended.default is before


def test_the_caller_has_to_name_something(machine):
    machine()
    with pytest.raises(BackendError, match="by the caller is ''; known: cpu, metal"):
        backends.choose("")


@pytest.mark.parametrize("case", ["hidden Metal", "hidden CUDA", "too old"])
def test_a_default_that_cannot_be_used_says_how_to_do_without(machine, case):
    built, info, more, _, told = REFUSALS[case]
    machine(built, info, **more)
    for ask in (backends.chosen, backends.current, backends.choose):
        with pytest.raises(BackendError) as caught:
            ask()
        message = str(caught.value)
        assert all(words in message for words in told) and "\n" not in message
        assert message.endswith(WAY_OUT)


def test_who_follows_that_advice_computes(machine, environment):
    machine("cuda", H100, visible=0)
    environment("cpu")
    assert backends.current().name == "cpu"


def test_the_choice_is_made_once(machine, environment):
    pretended = machine("cuda", H100)
    found = backends.chosen()
    environment("cpu")
    pretended.default = mx.Device(mx.cpu)
    assert backends.chosen() is found and backends.current().name == "cuda"


def test_another_choice_holds_from_then_on(machine):
    pretended = machine("cuda", H100)
    for name in ("cpu", "cuda", "cpu"):
        backends.choose(name)
        assert backends.current().name == name
        assert pretended.default.type == BACKENDS[name].kind


@pytest.mark.parametrize("name", ["gpu", "metal"])
def test_a_refusal_changes_nothing(machine, name):
    pretended = machine("cuda", H100)
    found, before = backends.choose("cuda"), pretended.default
    with pytest.raises(BackendError):
        backends.choose(name)
    assert backends.chosen() is found and pretended.default is before


def test_libraries_that_overwrite_one_another_are_warned_of_once(machine):
    machine("cuda", H100, libraries=("mlx-cpu", "mlx-cuda-13"))
    with pytest.warns(UserWarning) as caught:
        backends.current()
        backends.current()
    (warning,) = caught
    assert "mlx-cpu and mlx-cuda-13 are installed together" in str(warning.message)


# What a device says of itself, and what it leaves out


@pytest.mark.parametrize(
    ("name", "info", "limits"),
    [
        ("metal", MAC, Limits(48 * GB, wired=48 * GB)),
        ("metal", without(MAC, "max_recommended_working_set_size"), Limits(64 * GB)),
        ("metal", without(MAC, "memory_size"), Limits(48 * GB, wired=48 * GB)),
        ("metal", {}, Limits()),
        ("cuda", H100, Limits(80 * GB, free=78 * GB)),
        ("cuda", RTX, Limits(12 * GB, free=11 * GB)),
        ("cuda", without(H100, "free_memory"), Limits(80 * GB)),
        ("cuda", without(H100, "total_memory"), Limits(free=78 * GB)),
        ("cuda", {}, Limits()),
        ("cuda", H100 | {"total_memory": "80 GB"}, Limits(free=78 * GB)),
    ],
)
def test_limits_are_what_the_device_says(machine, name, info, limits):
    machine(name, info)
    assert backends.current().limits() == limits


def test_a_cpu_has_the_memory_of_its_machine(machine):
    machine()
    limits = backends.current().limits()
    assert limits == Limits(limits.memory) and limits.memory > GB


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_a_device_without_a_name_has_its_backend_s(machine, name):
    machine(name, {})
    assert backends.current().description() == name


def test_unknown_memory_refuses_no_training(machine, tiny):
    machine("cuda", without(H100, "total_memory"))
    memory.check(tiny, LoRA(), TrainSettings(), -1)
    machine("cuda", H100 | {"total_memory": 1000})
    with pytest.raises(TrainingError, match=r"this machine has 0\.0 GB"):
        memory.check(tiny, LoRA(), TrainSettings(), -1)


@pytest.mark.parametrize(
    ("major", "minor", "enough"),
    [
        *((major, minor, False) for major, minor in ((5, 2), (6, 1), (7, 0), (7, 2))),
        *((major, minor, True) for major, minor in ((7, 5), (8, 0), (9, 0))),
        *((major, minor, True) for major, minor in ((10, 0), (12, 1))),
    ],
)
def test_turing_is_the_oldest(machine, major, minor, enough):
    machine("cuda", capable(major, minor))
    missing = BACKENDS["cuda"].missing()
    if enough:
        assert missing is None
    else:
        assert f"NVIDIA Test has compute capability {major}.{minor}, " in missing


@pytest.mark.parametrize("key", ["major", "minor"])
def test_an_unknown_capability_is_not_refused(machine, key):
    machine("cuda", without(capable(6, 1), f"compute_capability_{key}"))
    assert BACKENDS["cuda"].missing() is None


def test_without_headers_there_are_no_kernels(machine, monkeypatch, tmp_path):
    machine("cuda", H100)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    missing = BACKENDS["cuda"].missing()
    assert missing.startswith("CUDA's headers are missing")
    (tmp_path / "packages" / "nvidia" / "cu13" / "include").mkdir(parents=True)
    assert BACKENDS["cuda"].missing() is None


# What is set before the first array


def test_kernels_outlive_the_process(machine, tmp_path):
    machine("cuda", H100)
    backends.current()
    folder = Path(os.environ[PTX_CACHE])
    assert folder.is_dir() and folder.is_relative_to(tmp_path / "cache")
    assert all(part in folder.name for part in (mx.__version__, "cuda13", "sm_90"))


def test_kernels_are_kept_apart_by_what_they_were_made_for(machine, monkeypatch):
    folders = set()
    for info, library in ((H100, "13"), (H100, "12"), (RTX, "13"), (RTX, "12")):
        monkeypatch.delenv(PTX_CACHE, raising=False)
        machine("cuda", info, libraries=(f"mlx-cuda-{library}",))
        backends.choose("cuda")
        folders.add(os.environ[PTX_CACHE])
        assert os.environ[PTX_CACHE].endswith(f"cuda{library}-{info['architecture']}")
    assert len(folders) == 4


@pytest.mark.parametrize("xdg", [None, ""])
def test_kernels_lie_in_the_home_unless_told_otherwise(
    machine, monkeypatch, tmp_path, xdg
):
    machine("cuda", H100)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    backends.current()
    assert Path(os.environ[PTX_CACHE]).is_relative_to(tmp_path / "home" / ".cache")


@pytest.mark.parametrize("place", ["/somewhere/else", ""])
def test_the_user_s_place_for_kernels_is_left_alone(machine, monkeypatch, place):
    machine("cuda", H100)
    monkeypatch.setenv(PTX_CACHE, place)
    backends.current()
    assert os.environ[PTX_CACHE] == place


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_kernels_go_where_mlx_puts_them(machine, monkeypatch):
    machine("cuda", H100)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert backends.current().name == "cuda"
    assert PTX_CACHE not in os.environ


def test_where_nothing_can_be_written_too(machine, monkeypatch, tmp_path):
    machine("cuda", H100)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert backends.current().name == "cuda"
    assert PTX_CACHE not in os.environ


@pytest.mark.parametrize("name", ["cpu", "metal"])
def test_other_devices_make_no_such_kernels(machine, name):
    machine(name, MAC)
    assert backends.current().name == name
    assert PTX_CACHE not in os.environ


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("metal", MAC),
        ("metal", {}),
        ("cuda", H100),
        ("cpu", CPU),
    ],
)
def test_no_wired_limit_is_raised(machine, name, info):
    pretended = machine(name, info)
    assert backends.current().name == name
    assert pretended.wired == []


@pytest.mark.parametrize(("name", "info"), MACHINES[1:])
@pytest.mark.parametrize("given", [None, "1"])
def test_a_gpu_multiplies_float32_whole_unless_told(
    machine, monkeypatch, name, info, given
):
    machine(name, info)
    if given is not None:
        monkeypatch.setenv(TF32, given)
    backends.current()
    assert os.environ[TF32] == (given or "0")


# Their choices


@pytest.mark.parametrize("name", BACKENDS)
def test_every_choice_is_explained_and_nothing_else(name):
    device = BACKENDS[name]
    assert set(device.why) == {f.name for f in fields(Choices)} | {"experts"}
    assert all(device.why.values())
    assert isinstance(device, Backend) and device.name == name


@pytest.mark.parametrize(
    ("wanted", "width", "forced"),
    [(False, 256, False), (True, 256, True), (True, 64, True), (True, 512, False)],
)
def test_metal_is_fused_by_force_only_where_it_can_be(
    monkeypatch, wanted, width, forced
):
    given = []
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *a, **more: given.append(more)
    )
    metal = BACKENDS["metal"]
    device = type(metal)(replace(metal.choices, fused_attention=wanted))
    queries = keys = mx.zeros((1, 1, 2, width))
    device.attend(queries, keys, keys, "causal")
    unforced = {"scale": 1.0, "mask": "causal"}
    assert given == [unforced | {"force_fused": True} if forced else unforced]


# For a while


class Other(backends.CPU):
    """A device like the first, but another."""


def test_a_while_ends(machine):
    pretended = machine("cuda", H100)
    found, before = backends.chosen(), pretended.default
    with backends.using(Other()) as other:
        assert backends.current() is other
        assert pretended.default.type == mx.DeviceType.cpu
        with backends.using(BACKENDS["cuda"]):
            assert pretended.default.type == mx.DeviceType.gpu
        assert backends.current() is other
        assert pretended.default.type == mx.DeviceType.cpu
    assert backends.chosen() is found and pretended.default is before


def test_a_while_ends_with_an_error_too(machine):
    pretended = machine("cuda", H100)
    found, before = backends.chosen(), pretended.default
    with pytest.raises(KeyError), backends.using(Other()):
        raise KeyError
    assert backends.chosen() is found and pretended.default is before


def test_a_while_chooses_nothing_for_later(machine, environment):
    machine("cuda", H100)
    with backends.using(Other()):
        pass
    environment("cpu")
    assert backends.current().name == "cpu"


def test_every_backend_can_be_imported_anywhere():
    package = Path(backends.__file__).parent
    files = package.glob("[!_]*.py")
    names = [f"mlx_dgemma.backends.{file.stem}" for file in files]
    assert len(names) > len(BACKENDS)
    command = [sys.executable, "-W", "error", "-c", f"import {', '.join(names)}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
