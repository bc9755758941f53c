"""A process whose engine thread has used MLX ends with its own status, not by an abort."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging, sys, threading
import mlx.core as mx
from mlx_serving.worker.process.child import leave

kept = []

def work():
    for number in range(2000):
        kept.append(mx.compile(lambda x, number=number: x + number))
        kept[-1](mx.zeros((2,)))

thread = threading.Thread(target=work, daemon=True)
thread.start()
thread.join()
print("said")
logging.getLogger().warning("logged")
leave(7)
"""


def ended(script: str) -> tuple[int, str, str]:
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    return run.returncode, run.stdout, run.stderr


def test_the_status_and_what_was_said_are_all_that_is_left() -> None:
    assert ended(SCRIPT) == (7, "said\n", "logged\n")
