"""How Python is started: no interpreter of ours imports code from the current folder.

`python -m` and `python -c` put the folder in which they are started first on `sys.path`, and
multiprocessing starts its children and its resource tracker with `-c`: a `json.py` in a folder that
somebody else filled would be run. `-P` and PYTHONSAFEPATH turn that off. Only this module starts
interpreters; a test of the house rules holds that.
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

    multiprocessing hands its `-P` on to whatever it starts in there.
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
    """Set PYTHONSAFEPATH: multiprocessing hands on only the flags of this interpreter."""
    os.environ["PYTHONSAFEPATH"] = "1"


def _leave_start_up_folder() -> None:
    """Take off `sys.path`, which spawned children get, what `-m` or `-c` put in front of it.

    It stays where mlx_serving itself was imported from it, as in a checkout; so do a script's
    folder and all of PYTHONPATH, which somebody chose.
    """
    main = sys.modules["__main__"]
    is_script = main.__spec__ is None and hasattr(main, "__file__")
    if sys.flags.safe_path or is_script or not sys.path:
        return
    with suppress(OSError):  # the folder is gone
        here, ours = Path.cwd(), Path(__file__).parents[2]
        if here.samefile(sys.path[0] or here) and not here.samefile(ours):
            del sys.path[0]
