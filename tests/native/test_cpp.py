"""The C++ tests: built without Python and run under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++"))),
        reason="needs CMake and a C++ compiler",
    ),
]


def _run(*command: str) -> None:
    # A preloaded BLAS would come before the address sanitizer's runtime, which refuses that.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpp_pieces_pass_their_tests_under_the_sanitizers(tmp_path: Path) -> None:
    build = str(tmp_path / "build")
    _run("cmake", "--preset", "sanitize", "-B", build)
    _run("cmake", "--build", build, "--parallel", "2")
    _run("ctest", "--test-dir", build, "--output-on-failure")
