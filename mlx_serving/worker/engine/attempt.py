"""What is done for some rows alone fails for them alone, and what failed before it for all."""

from collections.abc import Callable

from mlx_serving.worker.engine.launched import LaunchedWorkError
from mlx_serving.worker.engine.memory.out_of_memory import is_out_of_memory
from mlx_serving.worker.engine.memory.recovery import NO_MEMORY
from mlx_serving.worker.engine.sequence import RowError


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
