"""What is wrong under MLX: each broken installation in one line with its fix."""

from importlib.metadata import PackageNotFoundError

import pytest

from mlx_dgemma import installation

CPU, CUDA12, CUDA13 = installation.LIBRARIES
NO_FILE = "{}: cannot open shared object file: No such file or directory"
FAILED = "cudaMallocManaged(&data, size) failed: "
OLD_DRIVER = f"{FAILED}CUDA driver version is insufficient for CUDA runtime version"
GLIBC = (
    "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by x)"
)


@pytest.fixture
def libraries(monkeypatch):
    """`libraries("mlx-cpu")`: these packages are installed and no other."""

    def install(*names: str) -> None:
        def version(name: str) -> str:
            if name not in names:
                raise PackageNotFoundError(name)
            return "0.32.4"

        monkeypatch.setattr(installation, "version", version)

    return install


@pytest.mark.parametrize(
    ("error", "installed", "phrases"),
    [
        (
            NO_FILE.format("libcuda.so.1"),
            CUDA13,
            "no NVIDIA driver|580|mlx-dgemma[cpu]",
        ),
        (OLD_DRIVER, CUDA13, "version is insufficient|580|550.54.14|mlx-dgemma[cpu]"),
        (f"{FAILED}no CUDA-capable device", CUDA12, "nvidia-smi|CUDA_VISIBLE_DEVICES"),
        (GLIBC, CPU, "glibc 2.38|container"),
        (NO_FILE.format("libmlx.so"), "mlx", "no backend|[cpu]|[cuda13]"),
        (NO_FILE.format("libcudnn.so.9"), CUDA12, "libcudnn.so.9|'mlx-dgemma[cuda12]'"),
        (NO_FILE.format("libblas.so.3"), CPU, "libblas.so.3|'mlx-dgemma[cpu]'"),
        (OLD_DRIVER, f"{CPU} {CUDA13}", f"overwrite|uninstall -y mlx {CPU} {CUDA13}"),
    ],
)
def test_why_mlx_did_not_load(libraries, error, installed, phrases):
    libraries(*installed.split())
    message = installation.explain(ImportError(error))
    assert message is not None and "\n" not in message
    assert all(phrase in message for phrase in phrases.split("|"))


def test_other_import_errors_are_not_explained(libraries):
    libraries(CPU, CUDA13)
    for error in ("No module named 'rich'", "cannot import name 'x'"):
        assert installation.explain(ImportError(error)) is None


def test_one_library_does_not_clash(libraries):
    for names in ((), (CPU,), (CUDA12,)):
        libraries(*names, "mlx")
        assert installation.installed() == list(names)
        assert installation.several_libraries() is None


def test_headers_are_looked_for_where_mlx_does(monkeypatch, tmp_path):
    for variable, name, there in (
        ("CUDA_HOME", "nowhere", False),
        ("CUDA_HOME", "here", True),
        ("CUDA_PATH", "here", True),
    ):
        (tmp_path / "here" / "include").mkdir(parents=True, exist_ok=True)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / name))
        assert installation.has_headers(tmp_path / "packages") == there
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    (tmp_path / "packages" / installation.HEADERS[1]).mkdir(parents=True)
    assert installation.has_headers(tmp_path / "packages")
