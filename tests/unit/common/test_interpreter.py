"""How interpreters are started, and what is on their path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common import interpreter
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PATH_OF_A_COMMAND = """
import json, os, sys
from mlx_serving.common.interpreter import shut_out_current_folder
shut_out_current_folder()
print(json.dumps([sys.path, os.environ["PYTHONSAFEPATH"]]))
"""
GRANDCHILD = """
import os
from multiprocessing import get_context
with get_context("spawn").Pool(1) as pool:
    print(pool.apply(os.getcwd))
"""


def run(command: list[str], folder: Path, **environment: str) -> str:
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=given | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def path_of(command: list[str], folder: Path, **environment: str) -> list[str]:
    path, safe = json.loads(run(command, folder, **environment))
    assert safe == "1"
    return [str((folder / entry).resolve()) for entry in path]


def test_the_flag_reaches_what_multiprocessing_starts_in_there(tmp_path: Path) -> None:
    """The resource tracker and the pool's process; neither has an environment variable for it."""
    (tmp_path / "multiprocessing.py").write_text("raise SystemExit(7)")
    assert run(interpreter.command("-c", GRANDCHILD), tmp_path) == str(tmp_path)


def test_a_command_by_c_leaves_the_folder_that_it_was_started_in(tmp_path: Path) -> None:
    path = path_of([sys.executable, "-c", PATH_OF_A_COMMAND], tmp_path)
    assert str(tmp_path) not in path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module `command` that says its path."""
    (tmp_path / "command.py").write_text(PATH_OF_A_COMMAND)
    return tmp_path


def test_a_command_by_m_leaves_the_folder_that_it_was_started_in(folder: Path) -> None:
    assert str(folder) not in path_of([sys.executable, "-m", "command"], folder)


def test_what_the_user_put_on_pythonpath_is_the_users(folder: Path) -> None:
    path = path_of([sys.executable, "-m", "command"], folder, PYTHONPATH=str(folder))
    assert path.count(str(folder)) == 1


def test_a_scripts_folder_stays(folder: Path) -> None:
    assert str(folder) in path_of([sys.executable, "command.py"], folder)


def test_the_folder_of_the_package_itself_stays() -> None:
    assert path_of([sys.executable, "-c", PATH_OF_A_COMMAND], ROOT)[0] == str(ROOT)


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    gone = f"import os, sys; os.chdir({str(tmp_path)!r}); os.rmdir({str(tmp_path)!r})"
    run([sys.executable, "-c", gone + PATH_OF_A_COMMAND], ROOT)


def test_an_interpreter_whose_children_ignore_the_environment_spawns_none(tmp_path: Path) -> None:
    spawn = "from mlx_serving.common.interpreter import spawn_context as s; print(s())"
    assert "SpawnContext" in run([sys.executable, "-E", "-P", "-c", spawn], tmp_path)
    with pytest.raises(AssertionError, match="runs with -E"):
        run([sys.executable, "-E", "-c", spawn], tmp_path)
