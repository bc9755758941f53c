"""The models that a worker serves: which of them are in memory, and how another one gets there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.models.loading import finish
from mlx_serving.worker.models.model_budget import ModelBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

    from mlx_serving.worker.engine.engine_set import EngineSet
    from mlx_serving.worker.models.loading import LoadedModel

    Load = Callable[[str], Generator[None, None, LoadedModel]]

log = structlog.get_logger(__name__)

# A model that could not be loaded is tried again: its files may be there by then. The pause
# doubles from one failure to the next, up to the most.
RETRY_SECONDS: Final = 60.0
RETRY_MOST_SECONDS: Final = 3600.0
REASON_CHARS: Final = 200


class ModelTooLargeError(ValueError):
    """There can be no room for the model beside those that never leave."""


class ModelUnusableError(ValueError):
    """None of a worker's models can be tried."""


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why a model could not be loaded the last time, and how many times in a row that happened.

    It is tried again from `retry_at` on, in monotonic seconds.
    """

    reason: str
    times: int
    retry_at: float


@dataclass(frozen=True, slots=True)
class ModelsStatus:
    """What a worker's record and metrics say of its models."""

    resident: tuple[str, ...] = ()  # those in memory that jobs are claimed for
    loading: str = ""  # the one that is being loaded; "": none
    capacities: Mapping[str, int] = field(default_factory=dict)  # KV tokens by alias, once known
    failures: Mapping[str, str] = field(default_factory=dict)  # why those failed that could not be
    info: Mapping[str, str] = field(default_factory=dict)  # what the engine runs on


class LoadedModels:
    """A worker's models by alias, in the order in which they were named.

    The engine thread loads and drops them (`load_first`, the slices of `bring_up`); the main thread
    asks for that. What several threads read is replaced as a whole, never changed.

    `load` loads a model and `size_of` gives its size in bytes. `on_change(model)` is called in the
    engine thread after each load, whether it succeeded or failed.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        engines: EngineSet,
        load: Load,
        size_of: Callable[[str], int],
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.models, self.engines = models, engines
        self.budget = ModelBudget(dict.fromkeys(models, 0))
        self._load, self._size_of, self._on_change = load, size_of, on_change
        self._loaded: dict[str, LoadedModel] = {}
        self._failures: dict[str, LoadFailure] = {}
        self._capacities: dict[str, int] = {}
        self._info: Mapping[str, str] = {}  # of the model that was loaded last
        self._loaded_at: dict[str, float] = {}
        self._used_at: dict[str, float] = {}
        self.loading = ""
        # Models that make room for another one: no more jobs are claimed for them.
        self.leaving: frozenset[str] = frozenset()

    # What any thread may read

    @property
    def several(self) -> bool:
        """Whether the worker serves more than one model."""
        return len(self.models) > 1

    def get(self, model: str) -> LoadedModel | None:
        """Return the model if it is in memory."""
        return self._loaded.get(model)

    def resident(self) -> tuple[str, ...]:
        """Models in memory that jobs may be claimed for."""
        return tuple(m for m in self.models if m in self._loaded and m not in self.leaving)

    def loadable(self, model: str) -> bool:
        """Whether the model is worth a try: there can be room, and it did not fail lately."""
        failure = self._failures.get(model)
        failed_lately = failure is not None and time.monotonic() < failure.retry_at
        return not failed_lately and self.budget.ever_fits(model)

    def status(self) -> ModelsStatus:
        """What the worker's record and metrics say of the models."""
        info = {**self._info, "revision": self._revisions()} if self._info else {}
        failures = {model: failure.reason for model, failure in self._failures.items()}
        return ModelsStatus(self.resident(), self.loading, self._capacities, failures, info)

    def _revisions(self) -> str:
        """The revision of the model in memory; of several, each after its alias."""
        loaded = self._loaded
        revisions = {m: loaded[m].info.get("revision", "") for m in self.models if m in loaded}
        if not self.several:
            return next(iter(revisions.values()), "")
        return ", ".join(f"{model}={revision}" for model, revision in revisions.items())

    # What the main thread calls

    def touch(self, model: str) -> None:
        """Note that a job of the model was claimed."""
        self._used_at[model] = time.monotonic()

    def victims(self, model: str) -> tuple[str, ...] | None:
        """Models that have to leave for this one, see `ModelBudget.victims`."""
        self._renew_size(model)
        least_used_first = sorted(self._loaded, key=lambda m: self._used_at.get(m, 0.0))
        return self.budget.victims(model, least_used_first)

    def served_for(self, model: str) -> float:
        """Seconds since the model was loaded."""
        return time.monotonic() - self._loaded_at.get(model, 0.0)

    def _renew_size(self, model: str) -> None:
        """Read the size again: the model's files may have come, or changed, since the start."""
        sizes = {**self.budget.sizes, model: self._size_of(model)}
        self.budget = replace(self.budget, sizes=sizes)

    def avoid(self, models: Iterable[str]) -> None:
        """Don't try these for long, because a process died while it loaded them.

        A worker's only model is tried again at once.
        """
        retry_at = time.monotonic() + RETRY_MOST_SECONDS
        failure = LoadFailure("the worker's process died while it loaded the model", 1, retry_at)
        if self.several:
            self._failures = self._failures | dict.fromkeys(models, failure)

    # What the engine thread calls

    def load_first(self, budget: ModelBudget) -> EngineSet:
        """Load the models that are to be there before the first claim.

        Raises:
            Exception: nothing could be loaded; it is the first model's error.

        """
        self.budget = budget
        errors: list[Exception] = []
        failed = set(self._failures)
        while todo := [m for m in self._first(failed) if m not in self._loaded]:
            error = finish(self._bring_up(todo[0], ()))
            if error is not None:
                errors.append(error)
                failed.add(todo[0])
        if not self._loaded:
            raise errors[0] if errors else ModelUnusableError("; ".join(self._reasons()))
        return self.engines

    def _reasons(self) -> list[str]:
        return [f"{model}: {failure.reason}" for model, failure in self._failures.items()]

    def _first(self, failed: set[str]) -> tuple[str, ...]:
        sizes = {m: size for m, size in self.budget.sizes.items() if m not in failed}
        pinned = self.budget.pinned - failed
        chosen = replace(self.budget, sizes=sizes, pinned=pinned).first()
        # If nothing fits, the first model is tried, so that its error says why.
        return chosen or (self.models[:1] if not self._loaded and not failed else ())

    def bring_up(self, model: str, victims: tuple[str, ...]) -> Iterator[None]:
        """Load the model in place of victims, which must be idle: slices for `interleave`."""
        yield from self._bring_up(model, victims)

    def _bring_up(
        self, model: str, victims: tuple[str, ...]
    ) -> Generator[None, None, Exception | None]:
        self.loading = model
        began = time.monotonic()
        error: Exception | None = None
        try:
            self._require_room(model)
            loading = self._load(model)
            next(loading)  # the files are there and can be read; no weights are in memory yet
            for victim in victims:
                self._drop(victim)
                yield
            self.put(model, (yield from loading))
        except Exception as caught:  # noqa: BLE001 -- any error of a model concerns it alone
            error = caught
            self._note_failure(model, caught)
        else:
            log.info("model_loaded", model=model, in_place_of=list(victims),
                     seconds=round(time.monotonic() - began, 2))  # fmt: skip
        self.loading, self.leaving = "", frozenset()
        self._on_change(model)
        return error

    def _note_failure(self, model: str, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_CHARS]
        if self.several:  # the process itself logs why its only model failed, and ends
            log.error("model_load_failed", model=model, reason=reason)
        before = self._failures.get(model)
        times = before.times + 1 if before else 1
        pause = min(RETRY_SECONDS * 2 ** (times - 1), RETRY_MOST_SECONDS)
        failure = LoadFailure(reason, times, time.monotonic() + pause)
        self._failures = self._failures | {model: failure}

    def put(self, model: str, loaded: LoadedModel) -> None:
        """Take in a model that is loaded."""
        self._failures = {m: f for m, f in self._failures.items() if m != model}
        self._capacities = self._capacities | {model: loaded.engine.kv_tokens_capacity}
        self._loaded_at[model] = self._used_at[model] = time.monotonic()
        self.engines.put(model, loaded.engine)
        self._loaded = self._loaded | {model: loaded}
        self._info = loaded.info

    def _drop(self, model: str) -> None:
        loaded = self._loaded[model]
        self._loaded = {m: other for m, other in self._loaded.items() if m != model}
        self.engines.drop(model)
        loaded.close()
        log.info("model_dropped", model=model)

    def _require_room(self, model: str) -> None:
        budget = self.budget
        if budget.ever_fits(model):
            return
        pins = sorted(budget.pinned - {model})
        beside = f" beside {', '.join(pins)}" if pins else ""
        size = budget.sizes[model]
        message = (
            f"{size} bytes do not fit into worker.model_budget_bytes {budget.budget_bytes}{beside}"
        )
        raise ModelTooLargeError(message)
