"""Work without MLX in a thread of its own, while the engine thread continues. Imports no mlx."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

T = TypeVar("T")

SLICE_SECONDS: Final = 0.001  # to wait at each turn, so that the other thread gets the interpreter


def in_thread(work: Callable[[], T]) -> Generator[None, None, T]:
    """Call `work` in a thread of its own; yield until it is done, and return its result.

    Raises:
        Exception: what the work raises.
    """
    with ThreadPoolExecutor(1, "loading") as thread:
        future = thread.submit(work)
        while not future.done():
            wait((future,), SLICE_SECONDS)
            yield
        return future.result()
