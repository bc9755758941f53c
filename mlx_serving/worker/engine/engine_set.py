"""The engines of several models, stepped as one by the engine thread."""

from collections.abc import Callable, Iterable, Iterator

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.interface import (
    InferenceEngine,
    LaneRows,
    Output,
    Request,
    RequestRefusedError,
)
from mlx_serving.worker.engine.memory.kv_caches import KvMemory


class EngineSet:
    """The engines of the models in memory, by alias. Only the engine thread calls it.

    `Request.model` names the engine that decodes a request. Each engine has its own KV budget and
    its own rows; a request can park rows of its own model only. The dispatcher bounds the total
    number of rows.
    """

    def __init__(self, on_prefill: Callable[[Iterable[str]], None] | None = None) -> None:
        # Other threads read these two: they are replaced, never changed in place.
        self._engines: dict[str, InferenceEngine] = {}
        self._new: frozenset[str] = frozenset()  # models of which no step was timed
        self._stepping = ""  # the model whose step is under way
        self.on_prefill: Callable[[Iterable[str]], None] = on_prefill or _ignore
        self.on_launch: Callable[[], None] = _ignore
        self.on_stepped: Callable[[], None] = _ignore  # called after each model's step

    def put(self, model: str, engine: InferenceEngine) -> None:
        """Add an engine; it replaces one of the same model."""
        engine.on_prefill = self._tell_prefill
        engine.on_launch = self._tell_launch
        self._engines = self._engines | {model: engine}
        self._new |= {model}

    def drop(self, model: str) -> None:
        """Forget a model's engine, which must have no work."""
        self._engines = {name: e for name, e in self._engines.items() if name != model}
        self._new -= {model}

    def has(self, model: str) -> bool:
        """Whether there is an engine for the model."""
        return model in self._engines

    def fits(self, request: Request) -> bool:
        """Say whether the request fits its model's KV budget if nothing else is there."""
        engine = self._engines.get(request.model)
        return engine is not None and engine.fits(request)

    def can_add(self, request: Request) -> bool:
        """Say whether there is room for the request now; True if its model is not loaded.

        `add` then refuses it.
        """
        engine = self._engines.get(request.model)
        return engine is None or engine.can_add(request)

    def add(self, request: Request) -> None:
        """Admit a request; see `InferenceEngine.add`.

        Raises:
            RequestRefusedError: as there, and with `code` "model_not_loaded".

        """
        engine = self._engines.get(request.model)
        if engine is None:
            message = f"{request.model}: is not loaded any more"
            raise RequestRefusedError("model_not_loaded", message)
        engine.add(request)

    def abort(self, request_id: str) -> None:
        """Forget every choice of the request; unknown ids are ignored."""
        for engine in self._engines.values():
            engine.abort(request_id)

    def step(self) -> list[Output]:
        """Step each engine that has work, once."""
        outputs: list[Output] = []
        for model, engine in self._working():
            self._stepping = model
            stepped = engine.step()
            self.on_stepped()  # before its model counts as timed, see `EngineThread.time_left`
            if _waited(engine, stepped):
                self._new -= {model}
            outputs += stepped
        self._stepping = ""
        return outputs

    def _working(self) -> Iterator[tuple[str, InferenceEngine]]:
        return ((model, engine) for model, engine in self._engines.items() if engine.has_work)

    @property
    def first_use(self) -> bool:
        """Whether the present step, or the next one, is the first that is timed of its model.

        Models without work don't count, however long they are in memory.
        """
        stepping, new, engines = self._stepping, self._new, self._engines
        if stepping:
            return stepping in new
        return any(engines[model].has_work for model in new.intersection(engines))

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return any(True for _ in self._working())

    @property
    def running(self) -> int:
        """Rows in the decode batches."""
        return sum(engine.running for engine in self._engines.values())

    @property
    def waiting(self) -> int:
        """Admitted rows that are in no decode batch yet."""
        return sum(engine.waiting for engine in self._engines.values())

    @property
    def parked(self) -> int:
        """Rows that left a batch in favour of others and continue when there is room."""
        return sum(engine.parked for engine in self._engines.values())

    @property
    def request_ids(self) -> set[str]:
        """Ids of all requests that have a row, in any phase, or an Output not returned yet."""
        return set().union(*(engine.request_ids for engine in self._engines.values()))

    @property
    def lane_rows(self) -> LaneRows:
        """Rows in the batches, and parked ones, by lane."""
        rows = [engine.lane_rows for engine in self._engines.values()]
        nothing = (0,) * len(LANES)
        active, parked = (
            tuple(map(sum, zip(nothing, *each, strict=True)))
            for each in ([r.active for r in rows], [r.parked for r in rows])
        )
        return LaneRows(active, parked)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows, of all models."""
        return sum(engine.kv_tokens_used for engine in self._engines.values())

    @property
    def kv_tokens_capacity(self) -> int:
        """KV tokens that rows may reserve, of all models."""
        return sum(engine.kv_tokens_capacity for engine in self._engines.values())

    @property
    def kv_memories(self) -> tuple[KvMemory, ...]:
        """The memory guard's view of the KV caches of all engines."""
        return tuple(m for engine in self._engines.values() for m in engine.kv_memories)

    def _tell_launch(self) -> None:
        self.on_launch()

    def _tell_prefill(self, request_ids: Iterable[str]) -> None:
        self.on_prefill(request_ids)


def _waited(engine: InferenceEngine, outputs: list[Output]) -> bool:
    """Whether a step waited for the device: it read tokens, or left nothing running there.

    A step whose outputs have no tokens may not have used the device at all.
    """
    return any(output.token_ids for output in outputs) or not (outputs or engine.running)


def _ignore(*_news: object) -> None:
    """Do nothing."""
