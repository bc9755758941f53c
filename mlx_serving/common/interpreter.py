"""How Python is started: no interpreter that we start imports code from the current folder.

`python -m` and `python -c` put the current folder first on `sys.path`, and multiprocessing starts
its children and its resource tracker with `-c`. So a `json.py` in a folder that somebody else wrote
to would be run. `-P` and PYTHONSAFEPATH prevent that. Only this module starts interpreters, which a
test of the house rules checks.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_serving.common.errors import EngineError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext


def command(*arguments: str) -> list[str]:
    """The command line of an interpreter that does not import from the current folder.

    multiprocessing passes `-P` on to the processes that it starts.
    """
    return [sys.executable, "-P", *arguments]


def spawn_context() -> SpawnContext:
    """Multiprocessing's context whose children do not import from the current folder.

    Raises:
        EngineError: this interpreter runs with -E, so that its children ignore PYTHONSAFEPATH.

    """
    from multiprocessing import get_context  # a producer does not pay for it

    if sys.flags.ignore_environment and not sys.flags.safe_path:
        raise EngineError("Python runs with -E: run it with -P too, or its children are not safe")
    _make_children_safe()
    return get_context("spawn")


def shut_out_current_folder() -> None:
    """At the start of a command: neither it nor any process that it starts imports from there.

    Dependencies, too, start multiprocessing's resource tracker.
    """
    _make_children_safe()
    _leave_start_up_folder()


def _make_children_safe() -> None:
    """Set PYTHONSAFEPATH: multiprocessing passes on only the flags of this interpreter."""
    os.environ["PYTHONSAFEPATH"] = "1"


def _leave_start_up_folder() -> None:
    """Remove what `-m` or `-c` put first on `sys.path`, because spawned children inherit it.

    It stays if mlx_serving itself was imported from there, as in a checkout. A script's folder and
    PYTHONPATH stay too: somebody chose those.
    """
    main = sys.modules["__main__"]
    is_script = main.__spec__ is None and hasattr(main, "__file__")
    if sys.flags.safe_path or is_script or not sys.path:
        return
    with suppress(OSError):  # the folder is gone
        here, ours = Path.cwd(), Path(__file__).parents[2]
        if here.samefile(sys.path[0] or here) and not here.samefile(ours):
            del sys.path[0]
