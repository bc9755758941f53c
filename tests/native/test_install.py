"""An install whose native build fails, or was not asked for, works and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

REPORT = """
from mlx_serving.worker.engine.acceleration import reports
from mlx_serving.worker.engine.sampling.kernels import kernel_source
assert all(kernel_source(dialect) for dialect in ("cuda", "metal"))
print(*reports(prefer_native=True))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

pytest.importorskip("scikit_build_core", reason="comes with the dev extra")


def files_in(folder: Path) -> set[Path]:
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert found
    return found


@pytest.fixture(params=[{"CXX": "/nonexistent/c++"}, {"MLX_SERVING_NO_NATIVE_BUILD": "1"}], ids=str)
def install(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the package as pip installs it, without the compiler."""
    target = tmp_path / "site"
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(ROOT)]
    environment = {**os.environ, **request.param}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_an_install_without_a_compiler_works_and_says_so(install: Path, tmp_path: Path) -> None:
    package = install / "mlx_serving"
    assert not list(package.glob("_native*.so"))
    assert list(package.glob("common/lua/*.lua"))
    assert files_in(package / "kernels") == files_in(ROOT / "native" / "kernels")
    assert (package / "py.typed").exists()
    # -S skips the .pth files: this environment's editable finder would find the tree itself.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", REPORT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(install), *libraries])},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    reason = "this install was built without the native module"
    pieces = ("detokenizer", "sampler", "prefix index")
    expected = " ".join(f"{piece}: twin ({reason})" for piece in pieces)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
