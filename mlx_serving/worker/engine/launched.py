"""What was launched before, and fails while others wait for it, is no fault of theirs. Pure.

The device works on one step while the host does the next things: prompts are gathered, rows join.
Some of these wait for the device. On Metal such a wait raises what went wrong with the step under
way, and MLX then forgets it (`mlx/error.h`: "throw and clear"): nobody else hears of it, and the
step's arrays read as if they were good. So the wait's error is the step's, not that of who waited.
A command buffer's error may also come out where something else is launched; its words tell.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mlx_serving.worker.engine.memory.out_of_memory import is_out_of_memory

_AFTER_THE_FACT: Final = "Command buffer execution failed"  # Metal's, of what it was given before


class LaunchedWorkError(RuntimeError):
    """Something failed that was launched before: the batch's rows are lost.

    `memory_short`: it found no memory, so that the rows may begin again.
    """

    def __init__(self, error: Exception) -> None:
        """Take the place of what MLX raised."""
        super().__init__(type(error).__name__)
        self.memory_short = is_out_of_memory(error)


@contextmanager
def launched_work() -> Iterator[None]:
    """Whatever is raised in here was raised by what was launched before.

    Raises:
        LaunchedWorkError: in its place.
    """
    try:
        yield
    except LaunchedWorkError:
        raise
    except Exception as error:
        raise LaunchedWorkError(error) from error


@contextmanager
def beside_step(*, decoding: bool) -> Iterator[None]:
    """What is raised in here while rows decode may be the step's under way: its words tell.

    Raises:
        LaunchedWorkError: in its place, where that is so.
    """
    try:
        yield
    except RuntimeError as error:
        if decoding and _AFTER_THE_FACT in str(error):
            raise LaunchedWorkError(error) from error
        raise


def is_memory_short(error: Exception) -> bool:
    """Say whether a step failed for want of memory, which its rows survive."""
    return error.memory_short if isinstance(error, LaunchedWorkError) else is_out_of_memory(error)
