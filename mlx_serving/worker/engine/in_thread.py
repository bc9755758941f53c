"""Work that touches no MLX, done beside the engine thread while that goes on. Imports no mlx."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

T = TypeVar("T")

SLICE_SECONDS: Final = 0.001  # to wait at each turn: long enough to leave the interpreter to it


def aside(work: Callable[[], T]) -> Generator[None, None, T]:
    """Do it in a thread of its own; yield until it is done, and return what it returned.

    Raises:
        Exception: whatever the work raises.
    """
    with ThreadPoolExecutor(1, "loading") as thread:
        future = thread.submit(work)
        while not future.done():
            wait((future,), SLICE_SECONDS)
            yield
        return future.result()
