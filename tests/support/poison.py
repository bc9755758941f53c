"""Ways to kill the simulated engine from within a prompt: what no setting and no job can do.

A prompt that holds the word `POISON` makes the engine die as `Poison.how` says, in its prefill
or in the decode step after `after_tokens` tokens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_serving.common.job.schema import GenerationJob

POISON = "poison"
MARK = 6_666  # the token that it becomes


@dataclass(frozen=True)
class Poison:
    """`how`: abort, segfault, hang, memory, kill, machine (the parent dies too) or exception.

    `after_tokens` None: in prefill.
    `once`: a file that is made at the first death; where it is, nothing dies any more. `rows`: dies
    only in a batch so large, whatever its prompts; that is a crash that no job is to blame for.
    """

    how: str = "abort"
    after_tokens: int | None = None
    once: str = ""
    rows: int = 0

    def install(self) -> None:
        """Change the simulated engine of this process."""
        from mlx_serving.worker.engine import simulated

        encode = simulated.SimulatedPromptEncoder.encode

        def marked(encoder: Any, job: GenerationJob) -> tuple[int, ...]:
            tokens = encode(encoder, job)
            return (MARK, *tokens) if POISON in (job.prompt or "").split() else tokens

        simulated.SimulatedPromptEncoder.encode = marked  # type: ignore[method-assign, assignment]
        prefill, decode = simulated.SimulatedRunner.prefill, simulated.SimulatedRunner.decode

        def deadly_prefill(runner: Any, chunk: Any) -> None:
            if self.after_tokens is None:
                self._look(chunk.rows)
            prefill(runner, chunk)

        def deadly_decode(runner: Any) -> Any:
            if self.after_tokens is not None:
                self._look([r for r in runner._rows if r.decoded >= self.after_tokens])
            return decode(runner)

        simulated.SimulatedRunner.prefill = deadly_prefill  # type: ignore[method-assign, assignment]
        simulated.SimulatedRunner.decode = deadly_decode  # type: ignore[method-assign, assignment]

    def _look(self, rows: Any) -> None:
        if self.once and Path(self.once).exists():
            return
        if self.rows:
            deadly = len(rows) >= self.rows
        else:
            deadly = any(MARK in row.request.prompt for row in rows)
        if deadly:
            if self.once:
                Path(self.once).touch()
            die(self.how)


def die(how: str) -> None:
    """End, hang or fail."""
    if how == "abort":
        os.abort()
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "hang":
        time.sleep(3600)
    elif how == "memory":
        raise MemoryError
    elif how == "machine":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise RuntimeError(how)
