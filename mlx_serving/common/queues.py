"""Names of the queues: a model's lanes, and the protocol that workers of them speak.

Imports nothing heavy, so that a tool that only names a queue needs no pydantic.
"""

from __future__ import annotations

from typing import Final, Literal

PROTOCOL: Final = 1
"""Newest protocol that this code speaks. A worker leaves jobs that need a newer one queued."""

Lane = Literal["interactive", "default", "bulk"]
LANES: Final[tuple[Lane, ...]] = ("interactive", "default", "bulk")
"""In order of priority."""

_LANES: Final[dict[str, Lane]] = {lane: lane for lane in LANES}


def queue_name(model: str, lane: Lane) -> str:
    """RQ queue of a model's lane."""
    return f"{model}:{lane}"


def model_of(queue: str) -> str:
    """Return the alias of the model that a queue is for."""
    return queue.rpartition(":")[0]


def lane_of(queue: str) -> Lane:
    """Lane of an RQ queue of ours.

    Raises:
        ValueError: it is named otherwise.

    """
    lane = _LANES.get(queue.rpartition(":")[2])
    if lane is not None and ":" in queue:
        return lane
    message = f"queue {queue} is not the lane of a model"
    raise ValueError(message)
