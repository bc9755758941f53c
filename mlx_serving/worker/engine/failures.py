"""Whose fault a failed step is: of what some rows asked, or of what was launched before. Pure."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.engine.interface import RowError
from mlx_serving.worker.engine.memory.recovery import NO_MEMORY, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def attempt(what: str, act: Callable[[], None]) -> RowError | None:
    """Do `act`; whatever it raises is the rows' error `<what>_failed`, or that of no memory.

    Raises:
        LaunchedWorkError: what was launched before has failed.
    """
    try:
        act()
    except LaunchedWorkError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        if is_out_of_memory(error):
            return NO_MEMORY
        # The exception's own text may hold addresses or parts of the prompt.
        return RowError(f"{what}_failed", f"{what} raised {type(error).__name__}")
    return None


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
