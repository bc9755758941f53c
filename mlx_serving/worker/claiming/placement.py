"""Which of its models a worker claims for, and which one it brings up, beside the other workers.

It belongs to the main thread. A worker with a single model never asks: without that model it would
not run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import structlog

from mlx_serving.common.protocol import quarantine
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.queues import LANES, model_of, queue_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.models.loaded_models import LoadedModels
    from mlx_serving.worker.status.fleet import Fleet


@dataclass(frozen=True, slots=True)
class ModelQueues:
    """Queues of one model, in order of priority: what one claim looks into."""

    model: str
    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is not here and has jobs waiting; the oldest of them since so many seconds.

    `elsewhere`: a live worker has it in memory. Of those that would have to leave for it,
    `victims_busy` says whether any has rows, and `victims_served` for how many seconds the last
    to come has been here; None if none has to.
    """

    model: str
    seconds: float
    elsewhere: bool = False
    victims_busy: bool = False
    victims_served: float | None = None


def claim_order(
    models: Sequence[str], waiting: Mapping[str, int], lanes: Sequence[Lane] = LANES
) -> list[ModelQueues]:
    """Groups of queues with jobs, by the order of `lanes`, within a lane by that of `models`.

    `waiting` is how many jobs each queue has.
    """
    groups: list[ModelQueues] = []
    for lane in lanes:
        for model in models:
            queue = queue_name(model, lane)
            if not waiting.get(queue):
                continue
            if groups and groups[-1].model == model:
                groups[-1] = ModelQueues(model, (*groups[-1].queues, queue))
            else:
                groups.append(ModelQueues(model, (queue,)))
    return groups


def next_to_load(wanted: Collection[Wanted], *, idle: bool, patience: float) -> str | None:
    """Return the model to load now, the one that has been waited for the longest; or none.

    `idle`: nothing waits for the models that are here. A model that nobody has is loaded if this
    worker is idle and the models that leave for it have no rows; else once its jobs have waited for
    `patience` seconds and those that leave have had as long. A model that another worker has is
    that worker's to serve: it is loaded here too only if its jobs have waited so long and this
    worker is idle.
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


log = structlog.get_logger(__name__)


DECIDE_SECONDS: Final = 0.25


BRINGING_MS: Final = 6000  # longer than presence takes to say that the model is here


FRUITLESS_SECONDS: Final = 60.0


class Placement:
    """The main thread's side of `LoadedModels`.

    `interleave` has the engine thread do slices; `held` names the queues of the jobs held now.

    Raises:
        redis.RedisError: from `groups` and `settle`; they look again when next called.

    """

    def __init__(
        self,
        loaded_models: LoadedModels,
        protocol: Protocol,
        fleet: Fleet,
        worker: str,
        *,
        interleave: Callable[[Iterator[None]], None],
        held: Callable[[], Iterable[str]],
        patience: float,
    ) -> None:
        self.loaded_models, self.fleet = loaded_models, fleet
        self._protocol, self._worker = protocol, worker
        self._interleave, self._held, self._patience = interleave, held, patience
        # Who comes first among equals: the model whose jobs were claimed the longest ago.
        self._turn = list(loaded_models.models)
        self._coming = ""  # the model that is to be brought up
        self._decided_at = float("-inf")
        self._depths: dict[str, int] = {}
        # Queue → its depth when a claim got nothing from it, and when that was.
        self._fruitless: dict[str, tuple[int, float]] = {}

    # Claiming

    def groups(self, lanes: Sequence[Lane]) -> list[ModelQueues]:
        """Queues of these lanes to claim from now, those of one model in one claim, in order."""
        loaded_models = self.loaded_models
        if not loaded_models.several:
            (model,) = loaded_models.models
            return [ModelQueues(model, tuple(queue_name(model, lane) for lane in lanes))]
        self._look()
        here = loaded_models.resident()
        turn = [model for model in self._turn if model in here]
        return claim_order(turn, self._depths, lanes)

    def claimed(self, group: ModelQueues, jobs: int) -> None:
        """Note what a claim brought: the model's next turn comes after the others'."""
        if jobs:
            self.loaded_models.touch(group.model)
            self._turn.remove(group.model)
            self._turn.append(group.model)
            return
        for queue in group.queues:
            self._fruitless[queue] = (self._depths.get(queue, 0), time.monotonic())

    def _look(self) -> None:
        keys = self._protocol.keys
        queues = [queue_name(model, lane) for model in self.loaded_models.models for lane in LANES]
        with self._protocol.redis.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.llen(keys.rq_queue(queue))
            # A key of another type says nothing of the others.
            replies = pipe.execute(raise_on_error=False)
        self._depths = {
            queue: depth if isinstance(depth, int) else 0
            for queue, depth in zip(queues, replies, strict=True)
        }

    # Bringing up

    def settle(self, *, claiming: bool) -> None:
        """Go on with what is to be brought up, or see whether there is any; call it often.

        `claiming`: whether this worker takes jobs at all now.
        """
        now = time.monotonic()
        if not self.loaded_models.several or now - self._decided_at < DECIDE_SECONDS:
            return
        self._decided_at = now
        if self.loaded_models.loading:
            self._reserve(self.loaded_models.loading)
            return
        self._coming = self._choose() if claiming else ""
        if not self._coming or not self._reserve(self._coming):
            self._coming, self.loaded_models.leaving = "", frozenset()
            return
        victims = self.loaded_models.victims(self._coming) or ()
        self.loaded_models.leaving = frozenset(victims)
        if not self._busy(victims):
            self.loaded_models.loading = self._coming
            self._interleave(self.loaded_models.bring_up(self._coming, victims))

    def _choose(self) -> str:
        """Return the model to bring up, which is the one we are at while it is still wanted; ''."""
        self._look()
        here = self.loaded_models.resident()
        away = [
            model for model in self.loaded_models.models
            if self.loaded_models.get(model) is None and self._waiting(model)
            and self.loaded_models.loadable(model)
        ]  # fmt: skip
        if not away:
            return ""
        elsewhere = self.fleet.models_elsewhere()
        if self._coming in away and self._coming not in elsewhere:
            return self._coming
        ages = self._ages(away)
        wanted = [self._wanted(m, ages[m], elsewhere=m in elsewhere) for m in away if m in ages]
        idle = not any(self._waiting(model) for model in here)
        return next_to_load(wanted, idle=idle, patience=self._patience) or ""

    def _wanted(self, model: str, seconds: float, *, elsewhere: bool) -> Wanted:
        victims = self.loaded_models.victims(model) or ()
        served = min(map(self.loaded_models.served_for, victims), default=None)
        return Wanted(model, seconds, elsewhere, self._busy(victims), served)

    def _busy(self, models: Iterable[str]) -> bool:
        """Whether any of the models has a job in hand."""
        return not {model_of(queue) for queue in self._held()}.isdisjoint(models)

    def _waiting(self, model: str) -> bool:
        """Whether jobs wait that we could take: not those that a claim left behind."""
        now = time.monotonic()
        for queue in (queue_name(model, lane) for lane in LANES):
            depth, (left, at) = self._depths.get(queue, 0), self._fruitless.get(queue, (0, 0.0))
            if depth and not (depth == left and now - at < FRUITLESS_SECONDS):
                return True
        return False

    def _ages(self, models: Iterable[str]) -> dict[str, float]:
        """Seconds since the enqueue of each model's oldest waiting job."""
        keys, redis = self._protocol.keys, self._protocol.redis
        queues = [queue_name(m, lane) for m in models for lane in LANES]
        queues = [queue for queue in queues if self._depths.get(queue)]
        with redis.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.lindex(keys.rq_queue(queue), 0)
            heads = pipe.execute(raise_on_error=False)
            pipe.time()
            for head in heads:
                name = head.decode(errors="replace") if isinstance(head, bytes) else ""
                pipe.hget(keys.job(name), JobField.ENQUEUED_MS)
            clock, *times = pipe.execute(raise_on_error=False)
        if isinstance(clock, Exception):
            raise clock
        seconds, micros = clock
        ages: dict[str, float] = {}
        for queue, enqueued in zip(queues, times, strict=True):
            known = isinstance(enqueued, bytes) and enqueued.isdigit()
            age = seconds + micros / 1e6 - int(enqueued) / 1000 if known else 0.0
            ages[model_of(queue)] = max(age, ages.get(model_of(queue), 0.0))
        return ages

    def _reserve(self, model: str) -> bool:
        """Say that we bring the model up; False if another worker does."""
        key, redis = self._protocol.keys.bringing(model), self._protocol.redis
        take = partial(redis.set, key, self._worker, nx=True, get=True, px=BRINGING_MS)
        owner = cast("bytes | None", quarantine.mended(self._protocol.run, {key: "string"}, take))
        if owner is None:
            return True
        if owner != self._worker.encode():
            return False
        redis.pexpire(key, BRINGING_MS)
        return True
