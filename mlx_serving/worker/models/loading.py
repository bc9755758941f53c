"""How a worker loads a model: its kind of engine, its share of the memory, and what it says of it.

Loading runs in the engine thread. MLX is imported in the functions that need it: the worker's
parent and the simulated engine must not load it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from mlx_serving.worker.engine.in_thread import in_thread
from mlx_serving.worker.engine.scheduling.chunk import step_seconds
from mlx_serving.worker.engine.scheduling.limits import BatchSize
from mlx_serving.worker.models.model_budget import ModelBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.claiming.intake import Plan
    from mlx_serving.worker.delivery.token_text import Spell
    from mlx_serving.worker.engine.engine import Engine
    from mlx_serving.worker.engine.engine_set import EngineSet
    from mlx_serving.worker.engine.interface import InferenceEngine
    from mlx_serving.worker.engine.memory.device import DeviceMemory
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory

    Encode = Callable[[GenerationJob], tuple[int, ...]]


log = structlog.get_logger(__name__)

LOAD_SLICE_SECONDS: Final = 300.0  # the most that a slice of a model's load may take
SIMULATED_BYTES: Final = 1 << 30  # of a simulated model, in a model budget
SIMULATED_SLICES: Final = 10  # of a simulated load


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The kind of engine and the models. `simulated` costs time but no compute."""

    kind: Literal["mlx", "simulated"] = "mlx"
    model_path: str = ""  # of the first model
    tokens_per_second: float = 0.0  # of a simulated row; 0: a job takes one step and no time
    others: tuple[tuple[str, str], ...] = ()  # alias and path of the worker's further models
    load_seconds: float = 0.0  # that a simulated load takes
    prefill_tokens_per_second: float = 10_000.0  # of the simulated device, if its rows have a rate

    def paths(self, model: str) -> dict[str, str]:
        """Alias → path of all models; `model` is the first one's alias."""
        return {model: self.model_path, **dict(self.others)}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory: its engine, and what turns jobs into prompts and tokens into text."""

    engine: InferenceEngine
    encode: Encode  # makes a job's prompt
    plan: Plan  # makes the form of a job's output
    spell: Spell  # gives a token's bytes
    close: Callable[[], None] = lambda: None  # ends what the model has outside of this process
    info: Mapping[str, str] = field(default_factory=dict)  # see `describe`

    @property
    def keeps_prefixes(self) -> bool:
        """Whether later jobs find prefixes that earlier ones computed.

        A simulated model counts as one that keeps them.
        """
        return all(memory.keeps_prefixes for memory in self.engine.kv_memories)


def load(
    spec: EngineSpec, settings: Settings, path: str, kv_budget_bytes: int | None
) -> Generator[None, None, LoadedModel]:
    """Load one model and warm it up, a slice at each `next`; the first slice reads no weights.

    Raises:
        MlxServingError: the model can't be loaded; the message says why.

    """
    if spec.kind == "simulated":
        return (yield from _load_simulated(spec, settings))
    return (yield from _load_mlx(settings, path, kv_budget_bytes))


def model_bytes(spec: EngineSpec, path: str) -> int:
    """Size of a model's weights; 0 if it is not there."""
    if spec.kind == "simulated":
        return SIMULATED_BYTES
    from mlx_serving.worker.engine.model_files import weight_bytes

    try:
        return weight_bytes(Path(path))
    except OSError:
        return 0


def plan_memory(
    spec: EngineSpec, settings: Settings, paths: Mapping[str, str]
) -> tuple[ModelBudget, int | None]:
    """Return the budget for models, and the bytes that each model has for its KV caches.

    The KV budget is shared equally by as many models as can be in memory at once. None: there is
    one model, and it takes what its weights leave once they are loaded.
    """
    sizes = {model: model_bytes(spec, path) for model, path in paths.items()}
    pinned, bound, kv = (
        frozenset(settings.worker.pinned_models), settings.worker.model_budget_bytes,
        settings.cache.budget_bytes,
    )  # fmt: skip
    if spec.kind == "mlx" and len(sizes) > 1 and (bound is None or kv is None):
        from mlx_serving.worker.engine.loader import default_budgets  # imports MLX

        model_bytes_, kv_bytes = default_budgets(sum(sizes.values()), bound)
        bound, kv = bound or model_bytes_, kv or kv_bytes
    budget = ModelBudget(sizes, bound, pinned & sizes.keys())
    return budget, kv if kv is None else kv // budget.most_at_once()


def memory_of(
    spec: EngineSpec, engine: EngineSet, available: Callable[[], int | None]
) -> tuple[DeviceMemory | None, Callable[[], Sequence[KvMemory]]]:
    """What the memory keeper watches: the device and the KV caches; nothing if it is simulated.

    `available` says how many bytes the system could still give.
    """
    if spec.kind == "simulated":
        return None, tuple
    from mlx_serving.worker.engine.memory.device import MlxMemory  # imports MLX

    return MlxMemory(available), lambda: engine.kv_memories


def describe(device: str, engine: InferenceEngine) -> dict[str, str]:
    """Say what an engine runs on, for the worker's record and metrics.

    `device`, the model's `revision`, and of the accelerated pieces: `acceleration`, native or twin
    for each and why; `implementation`, "native" if all are, "twin" if one is not, "none" if there
    is none.
    """
    reports = getattr(engine, "acceleration", ())
    kinds = {report.implementation for report in reports}
    return {
        "device": device,
        "acceleration": "; ".join(map(str, reports)),
        "implementation": ("twin" if "twin" in kinds else "native") if kinds else "none",
        "revision": engine.model_info.revision,
    }


def _load_mlx(
    settings: Settings, path: str, kv_budget_bytes: int | None
) -> Generator[None, None, LoadedModel]:
    # Imported here: the parent and the simulated engine must not load MLX.
    from mlx_serving.worker.engine.loader import EngineOptions, load_in_slices
    from mlx_serving.worker.engine.memory.device import device_name
    from mlx_serving.worker.engine.structured.plan import OutputPlanner
    from mlx_serving.worker.engine.text.prompts import PromptEncoder

    options = EngineOptions(
        max_batch_rows=settings.batch.max_rows,
        kv_budget_bytes=kv_budget_bytes,
        prefix_cache_bytes=settings.cache.prefix_bytes,
        kv_cache=settings.cache.kind,
        kv_bits=settings.cache.bits,
        prefill_chunk_tokens=settings.batch.prefill_chunk_tokens,
        lane_min_share=settings.batch.lane_min_share,
        lane_headroom=settings.batch.lane_headroom,
        prefer_native=settings.engine.native,
        step_seconds=step_seconds(settings.engine.stall_seconds),
    )
    engine = yield from load_in_slices(path, options)
    for report in engine.acceleration:
        log.info("acceleration", piece=report.piece, implementation=report.implementation,
                 reason=report.reason)  # fmt: skip
    encode = PromptEncoder(engine.tokenizer).encode
    yield from in_thread(lambda: _warm_up(encode))
    planner = OutputPlanner(engine.tokenizer, engine.model_info)
    yield from in_thread(planner.warm_up)
    spell = yield from in_thread(lambda: _speller(engine))
    info = describe(device_name(), engine)
    return LoadedModel(engine, encode, planner.plan, spell, planner.close, info)


def _speller(engine: Engine) -> Spell:
    """Return what spells the engine's token ids. It takes some 0.3 s at 150,000 tokens."""
    # Imported here: only a worker with a real model reads a vocabulary.
    from mlx_serving.worker.delivery.token_text import speller
    from mlx_serving.worker.engine.text.vocabulary import read_vocabulary

    return speller(read_vocabulary(engine.tokenizer))


def _warm_up(encode: Encode) -> None:
    """Compile the chat template and the job's validators now, so that no job waits for it."""
    # Imported here: the parent, which only names an engine, does without pydantic's models.
    from mlx_serving.common.job.schema import GenerationJob

    job = GenerationJob.parse({"model": "warm-up", "messages": [{"role": "user", "content": "x"}]})
    with suppress(Exception):  # a template may refuse so short a conversation
        encode(GenerationJob.from_wire(job.to_wire()))


def batch_size(settings: Settings) -> BatchSize:
    """Return how many rows a worker's batch may have, by the settings."""
    return BatchSize.of(
        settings.batch.max_rows, settings.batch.lane_min_share, settings.batch.lane_headroom
    )


def _load_simulated(spec: EngineSpec, settings: Settings) -> Generator[None, None, LoadedModel]:
    from mlx_serving.worker.engine import simulated

    yield
    for _ in range(SIMULATED_SLICES if spec.load_seconds else 0):
        time.sleep(spec.load_seconds / SIMULATED_SLICES)
        yield
    batch = batch_size(settings)
    options = (
        simulated.SimulatedOptions(
            spec.tokens_per_second,
            spec.prefill_tokens_per_second,
            batch=batch,
            step_seconds=step_seconds(settings.engine.stall_seconds),
        )
        if spec.tokens_per_second
        else simulated.SimulatedOptions.zero_cost(batch)
    )
    encode = simulated.SimulatedPromptEncoder().encode
    engine = simulated.SimulatedEngine(options)
    info = describe("simulated", engine) | {"acceleration": "none"}
    return LoadedModel(engine, encode, simulated.plan, simulated.spell, info=info)


def finish(loading: Generator[None, None, Any]) -> Any:  # noqa: ANN401 -- what the load returns
    """Run a load to its end at once, and return what was loaded."""
    try:
        while True:
            next(loading)
    except StopIteration as loaded:
        return loaded.value
