"""The function that RQ jobs name. It is never called: our worker reads the arguments itself."""

from __future__ import annotations

from typing import Any, NoReturn


def generate(wire: dict[str, Any]) -> NoReturn:
    """Fail, because the job reached the wrong kind of worker.

    A stock `rq worker` that listens on one of our queues calls this. It has no batch, no lease and
    no event stream.

    Raises:
        RuntimeError: always.

    """
    del wire
    message = (
        "this job is for `mlx-serving worker`; a stock rq worker can't run it: "
        "take this queue off that worker and requeue the job"
    )
    raise RuntimeError(message)
