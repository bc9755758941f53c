"""Tells errors of single rows from errors of work that was launched before. Pure.

The device works on one step while the host does the next things: prompts are gathered, rows join.
Some of these wait for the device. On Metal such a wait raises the error of the step under way, and
MLX then forgets the error (`mlx/error.h`: "throw and clear"). Nobody else hears of it, and the
step's arrays read as if they were good. So the error of a wait belongs to the step, not to the
caller that waited. A command buffer's error may also appear when something else is launched; its
text tells.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.engine.interface import RowError
from mlx_serving.worker.engine.memory.recovery import NO_MEMORY, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def attempt(what: str, act: Callable[[], None]) -> RowError | None:
    """Call `act`; return its error as the rows' error `<what>_failed`, or as out of memory.

    Raises:
        LaunchedWorkError: work that was launched before failed.
    """
    try:
        act()
    except LaunchedWorkError:
        raise
    except Exception as error:  # noqa: BLE001 - any error is the rows' own
        if is_out_of_memory(error):
            return NO_MEMORY
        # The exception's own text may hold addresses or parts of the prompt.
        return RowError(f"{what}_failed", f"{what} raised {type(error).__name__}")
    return None


_AFTER_THE_FACT: Final = (
    "Command buffer execution failed"  # Metal's message for work that was launched before
)


class LaunchedWorkError(RuntimeError):
    """Work failed that was launched before: the batch's rows are lost.

    `memory_short`: it failed for lack of memory, so the rows may begin again.
    """

    def __init__(self, error: Exception) -> None:
        """Take the error that MLX raised."""
        super().__init__(type(error).__name__)
        self.memory_short = is_out_of_memory(error)


@contextmanager
def launched_work() -> Iterator[None]:
    """Treat any error in this block as one of work that was launched before.

    Raises:
        LaunchedWorkError: in place of that error.
    """
    try:
        yield
    except LaunchedWorkError:
        raise
    except Exception as error:
        raise LaunchedWorkError(error) from error


@contextmanager
def beside_step(*, decoding: bool) -> Iterator[None]:
    """Treat an error in this block as the running step's, if rows decode and its message says so.

    Raises:
        LaunchedWorkError: in place of an error of the running step.
    """
    try:
        yield
    except RuntimeError as error:
        if decoding and _AFTER_THE_FACT in str(error):
            raise LaunchedWorkError(error) from error
        raise


def is_memory_short(error: Exception) -> bool:
    """Say whether a step failed for lack of memory: then its rows may begin again."""
    return error.memory_short if isinstance(error, LaunchedWorkError) else is_out_of_memory(error)
