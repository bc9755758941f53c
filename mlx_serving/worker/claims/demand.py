"""What waits for a worker's models: in which order to claim it, what to bring up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_serving.common.job.schema import LANES, queue_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mlx_serving.common.job.schema import Lane


@dataclass(frozen=True, slots=True)
class Group:
    """Queues of one model, in order of priority: what one claim looks into."""

    model: str
    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is not here and has jobs waiting; the oldest of them since so many seconds.

    `elsewhere`: a live worker has it in memory. Of those that would have to leave for it,
    `victims_busy` says whether any has rows, and `victims_served` for how many seconds the last
    to come has been here; None where none has to.
    """

    model: str
    seconds: float
    elsewhere: bool = False
    victims_busy: bool = False
    victims_served: float | None = None


def claim_order(
    models: Sequence[str], waiting: Mapping[str, int], lanes: Sequence[Lane] = LANES
) -> list[Group]:
    """Groups of queues with jobs, by the order of `lanes`, within a lane by that of `models`.

    `waiting` is how many jobs each queue has.
    """
    groups: list[Group] = []
    for lane in lanes:
        for model in models:
            queue = queue_name(model, lane)
            if not waiting.get(queue):
                continue
            if groups and groups[-1].model == model:
                groups[-1] = Group(model, (*groups[-1].queues, queue))
            else:
                groups.append(Group(model, (queue,)))
    return groups


def next_to_load(wanted: Collection[Wanted], *, idle: bool, patience: float) -> str | None:
    """Return the model to load now, the one that has been waited for the longest; or none.

    `idle`: nothing waits for the models that are here. A model that nobody has is loaded where
    that is so and those that leave for it have no rows; elsewhere once its jobs have waited for
    `patience` seconds and those that leave have had as long. A model that another worker has is
    that one's to serve: it is loaded here too only where it has jobs that waited so long, and we
    have none.
    """
    for one in sorted(wanted, key=lambda w: w.seconds, reverse=True):
        overdue = one.seconds >= patience
        free = idle and not one.victims_busy
        served = one.victims_served is None or one.victims_served >= patience
        if free and (overdue or not one.elsewhere):
            return one.model
        if overdue and served and not one.elsewhere:
            return one.model
    return None
