"""How a process ends in which a thread has used MLX."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process at once, with everything said that was to be said.

    MLX keeps compiled functions by thread. Those of the engine's thread are dropped when it ends,
    after Python counts it as joined, and dropping them takes the interpreter's lock: where the
    interpreter is being torn down by then, the process aborts ("terminate called without an
    active exception"). On CUDA the driver may be gone before MLX's threads are, too. What a
    worker leaves behind is in Redis; a teardown adds nothing to it.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)
