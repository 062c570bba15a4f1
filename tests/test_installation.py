"""What is wrong under MLX: each situation in one line, with the mend that fits it."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mlx_dgemma import installation
from mlx_dgemma.installation import LIBRARIES, TOOLKITS

CPU, CUDA12, CUDA13 = LIBRARIES
NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"
FAILED = "cudaMallocManaged(&data, size) failed: "
OLD_DRIVER = f"{FAILED}CUDA driver version is insufficient for CUDA runtime version"
NO_GPU = f"{FAILED}no CUDA-capable device is detected"
GLIBC = "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_{}' not found (required by x)"


def missing(file: str) -> str:
    return NO_DRIVER.replace("libcuda.so.1", file)


@pytest.fixture
def machine(monkeypatch):
    """`machine("mlx-cpu", driver=12020)`: what is installed, what its driver knows."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")

    def pretend(*libraries: str, driver: int | None = None) -> None:
        def version(name: str) -> str:
            if name not in libraries:
                raise PackageNotFoundError(name)
            return "0.32.4"

        monkeypatch.setattr(installation, "version", version)
        monkeypatch.setattr(installation, "driver_accepts", lambda *library: driver)

    pretend()
    return pretend


def says(message: str | None, told: str, untold: str = "") -> None:
    """One line with each of the `told` phrases and none of the others, "; " between."""
    assert message is not None
    assert len(message.splitlines()) == 1 and message == message.strip()
    for phrase in told.split("; "):
        assert phrase in message
    for phrase in untold.split("; ") if untold else ():
        assert phrase not in message


@pytest.mark.parametrize("names", [(), (CPU,), (CUDA12,), (CPU, CUDA12, CUDA13)])
def test_what_is_installed_is_what_the_metadata_say(machine, names):
    machine(*names, "mlx", "mlx-lm")
    assert installation.installed() == names


@pytest.mark.parametrize("names", [(), (CPU,), (CUDA12,), (CUDA13,)])
def test_one_library_is_no_clash(names):
    assert installation.clash(names) is None


def test_a_clash_names_all_and_uninstalls_all():
    found = installation.clash((CPU, CUDA13))
    says(found, f"{CPU} and {CUDA13}; pip uninstall -y mlx {CPU} {CUDA13}", CUDA12)


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        ((), "cuda13"),
        ((CPU,), "cuda13"),
        ((CUDA12,), "cuda12"),
        ((CUDA13,), "cuda13"),
        ((CPU, CUDA12), "cuda12"),
        ((CUDA12, CUDA13), "cuda13"),
    ],
)
def test_the_toolkit_is_that_of_the_cuda_library(machine, names, extra):
    machine(*names)
    assert installation.toolkit().extra == extra


@pytest.mark.parametrize(
    ("names", "told", "untold"),
    [
        ((CPU,), "without CUDA; [cuda13]; 580; [cuda12]; 550.54.14", "overwrite"),
        ((), "without CUDA; [cuda13]; 580; [cuda12]; 550.54.14", "overwrite"),
        ((CPU, CUDA13), f"overwrite; pip uninstall -y mlx {CPU} {CUDA13}", "580"),
    ],
)
def test_mlx_without_cuda_says_what_to_install(machine, names, told, untold):
    machine(*names)
    says(installation.cuda_missing(), told, untold)


def test_a_mac_is_not_told_to_install_cuda(machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    says(installation.cuda_missing(), "Linux; metal", "pip; cuda13")


@pytest.mark.parametrize(
    ("library", "driver", "told", "untold"),
    [
        (CUDA13, 12020, "to 12.2; needs 13.0; 580; [cuda12] in place of [cuda13]", ""),
        (CUDA13, 12000, "to 12.0; needs 13.0; 580; [cuda12] in place of [cuda13]", ""),
        (CUDA13, 12090, "to 12.9; needs 13.0; 580; [cuda12] in place of [cuda13]", ""),
        (CUDA13, 11080, "to 11.8; needs 13.0; 580 or newer", "cuda12"),
        (CUDA12, 11080, "to 11.8; needs 12.0; 550.54.14 or newer", "cuda12; 580"),
        (CUDA13, 13000, "no NVIDIA GPU is visible; nvidia-smi", "update; 13.0"),
        (CUDA13, 13010, "no NVIDIA GPU is visible; nvidia-smi", "update; 13.1"),
        (CUDA12, 12000, "no NVIDIA GPU is visible; nvidia-smi", "update; 12.0"),
        (CUDA12, 13000, "no NVIDIA GPU is visible; nvidia-smi", "update; 13.0"),
        (CUDA13, None, "no NVIDIA GPU is visible; nvidia-smi", "update; None"),
    ],
)
def test_a_driver_too_old_is_told_from_no_gpu(machine, library, driver, told, untold):
    machine(library, driver=driver)
    says(installation.invisible_gpu({}), told, f"CUDA_VISIBLE; {untold}".strip("; "))


@pytest.mark.parametrize("hidden", ["", "-1", "7"])
def test_a_gpu_that_the_environment_hides_names_the_variable(machine, hidden):
    machine(CUDA13, driver=13000)
    found = installation.invisible_gpu({"CUDA_VISIBLE_DEVICES": hidden})
    says(found, f"CUDA_VISIBLE_DEVICES is {hidden!r}", "nvidia-smi")


def test_an_old_driver_comes_before_a_hidden_gpu(machine):
    machine(CUDA13, driver=12020)
    found = installation.invisible_gpu({"CUDA_VISIBLE_DEVICES": ""})
    says(found, "12.2; 13.0", "CUDA_VISIBLE_DEVICES")


ANSWER = "int cuDriverGetVersion(int *found) {{ *found = {}; return {}; }}"


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        (ANSWER.format(12020, 0), 12020),
        (ANSWER.format(13000, 0), 13000),
        (ANSWER.format(13000, 34), None),
    ],
    ids=["12.2", "13.0", "an error"],
)
def test_the_driver_says_which_cuda_it_runs(tmp_path, source, accepted):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libdriver.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    assert installation.driver_accepts(str(library)) == accepted


def test_without_a_driver_nothing_is_accepted(tmp_path):
    torn = tmp_path / "libtorn.so"
    torn.touch()
    assert installation.driver_accepts(str(torn)) is None
    assert installation.driver_accepts(str(tmp_path / "libnone.so")) is None


@pytest.mark.parametrize("library", TOOLKITS)
def test_headers_lie_beside_mlx(machine, tmp_path, library):
    machine(library)
    nowhere = {"CUDA_HOME": str(tmp_path / "nowhere")}
    found = installation.headers_missing(tmp_path, nowhere)
    says(found, f"pip install {TOOLKITS[library].runtime},; CUDA_HOME")
    (tmp_path / TOOLKITS[library].headers).mkdir(parents=True)
    assert installation.headers_missing(tmp_path, nowhere) is None


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"CUDA_HOME": "here"}, True),
        ({"CUDA_PATH": "here"}, True),
        ({"CUDA_HOME": "here", "CUDA_PATH": "nowhere"}, True),
        ({"CUDA_HOME": "nowhere", "CUDA_PATH": "here"}, False),
        ({"CUDA_PATH": "nowhere"}, False),
    ],
)
def test_headers_lie_where_the_environment_says(machine, tmp_path, environment, found):
    machine(CUDA13)
    (tmp_path / "here" / "include").mkdir(parents=True)
    places = {name: str(tmp_path / place) for name, place in environment.items()}
    missing = installation.headers_missing(tmp_path / "packages", places)
    assert (missing is None) == found


def test_headers_may_be_those_of_the_system(machine, tmp_path, monkeypatch):
    machine(CUDA13)
    system = "/usr/local/cuda/include"
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == system)
    assert installation.headers_missing(tmp_path, {}) is None
    assert installation.headers_missing(tmp_path, {"CUDA_HOME": "/opt"}) is not None


@pytest.mark.parametrize(
    ("library", "driver", "error", "told", "untold"),
    [
        (
            CUDA13,
            None,
            NO_DRIVER,
            "no NVIDIA driver; libcuda.so.1; 580; [cpu] in place of [cuda13]",
            "550",
        ),
        (CUDA12, None, NO_DRIVER, "550.54.14; [cpu] in place of [cuda12]", "580"),
        (
            CUDA13,
            12020,
            OLD_DRIVER,
            "driver version is insufficient; to 12.2; needs 13.0; 580; [cuda12] in "
            "place of [cuda13]; [cpu] in place of [cuda13]",
            "nvidia-smi",
        ),
        (CUDA13, 11080, OLD_DRIVER, "to 11.8; [cpu] in place of [cuda13]", "cuda12"),
        (
            CUDA13,
            13000,
            NO_GPU,
            "no CUDA-capable device; no NVIDIA GPU is visible; nvidia-smi; [cpu] in "
            "place of [cuda13]",
            "update",
        ),
        (CUDA12, 12040, NO_GPU, "nvidia-smi; [cpu] in place of [cuda12]", "update"),
        (CPU, None, GLIBC.format("2.35"), "glibc 2.35; Ubuntu 22.04; container", "pip"),
        (CPU, None, GLIBC.format("2.38"), "glibc 2.38; container", "Ubuntu 22.04"),
        ("mlx", None, missing("libmlx.so"), "no backend; [cpu]; [cuda13]", "reinstall"),
        (
            CUDA13,
            13000,
            missing("libcudnn.so.9"),
            "libcudnn.so.9 is missing; --force-reinstall 'mlx-dgemma[cuda13]'",
            "cpu; driver",
        ),
        (
            CUDA12,
            12040,
            missing("libcublasLt.so.12"),
            "libcublasLt.so.12 is missing; --force-reinstall 'mlx-dgemma[cuda12]'",
            "cpu; driver",
        ),
        (
            CPU,
            None,
            missing("libopenblas-r0.3.so"),
            "libopenblas-r0.3.so is missing; --force-reinstall 'mlx-dgemma[cpu]'",
            "cuda",
        ),
    ],
)
def test_why_mlx_did_not_load(machine, library, driver, error, told, untold):
    machine(library, driver=driver)
    says(installation.explain(ImportError(error)), told, untold)


@pytest.mark.parametrize("error", [NO_DRIVER, OLD_DRIVER, missing("libopenblas.so.0")])
def test_of_two_libraries_one_has_to_go_first(machine, error):
    machine(CPU, CUDA13)
    mend = f"pip uninstall -y mlx {CPU} {CUDA13}"
    says(installation.explain(ImportError(error)), mend, "force-reinstall; in place of")


def test_a_hidden_gpu_is_told_when_mlx_did_not_load(machine, monkeypatch):
    machine(CUDA13, driver=13000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    says(installation.explain(ImportError(NO_GPU)), "CUDA_VISIBLE_DEVICES is '-1'")


@pytest.mark.parametrize(
    "error", ["No module named 'rich'", "cannot import name 'load' from 'mlx_lm'", ""]
)
def test_other_import_errors_are_not_explained(machine, error):
    machine(CPU, CUDA13)
    assert installation.explain(ImportError(error)) is None


def test_it_imports_no_mlx():
    check = "import mlx_dgemma.installation, sys; assert 'mlx.core' not in sys.modules"
    command = [sys.executable, "-W", "error", "-c", check]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
