"""Which engine a worker runs, and how it comes up. Runs in the engine thread; imports MLX late."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.jobs import GenerationJob
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.device_memory import DeviceMemory
    from mlx_serving.worker.engine.kv_memory import KvMemory
    from mlx_serving.worker.engine.sequence import InferenceEngine
    from mlx_serving.worker.intake import Plan
    from mlx_serving.worker.token_text import Spell

    Encode = Callable[[GenerationJob], tuple[int, ...]]


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """`mlx` runs the model at `model_path`; `simulated` costs time but no compute.

    `tokens_per_second` is a simulated row's rate; 0: a job takes one step and no time.
    """

    kind: Literal["mlx", "simulated"] = "mlx"
    model_path: str = ""
    tokens_per_second: float = 0.0


def load(spec: EngineSpec, settings: Settings) -> tuple[InferenceEngine, Encode]:
    """Bring the engine up, warm.

    Raises:
        MlxServingError: the model can't be loaded; the message says why.

    """
    if spec.kind == "simulated":
        return _load_simulated(spec, settings)
    return _load_mlx(spec, settings)


def speller_of(spec: EngineSpec, engine: InferenceEngine) -> Spell:
    """What spells the engine's token ids; some 0.3 s at 150,000 tokens, so before any claim."""
    if spec.kind == "simulated":
        from mlx_serving.worker.engine.simulated import spell

        return spell
    # Imported here: the vocabulary's reader is for workers with a model.
    from mlx_serving.worker.engine.vocabulary import read_vocabulary
    from mlx_serving.worker.token_text import speller

    return speller(read_vocabulary(getattr(engine, "tokenizer", None)))


def planner_of(spec: EngineSpec, engine: InferenceEngine) -> Plan:
    """What plans the output of the engine's jobs: grammars and formats."""
    if spec.kind == "simulated":
        from mlx_serving.worker.engine.simulated import plan

        return plan
    # Imported here: the planner imports MLX.
    from mlx_serving.worker.engine.output_plan import OutputPlanner

    planner = OutputPlanner(getattr(engine, "tokenizer", None), engine.model_info)
    planner.warm_up()
    return planner.plan


def memory_of(
    spec: EngineSpec, engine: InferenceEngine, available: Callable[[], int | None]
) -> tuple[DeviceMemory | None, Callable[[], Sequence[KvMemory]]]:
    """What the memory keeper watches of an engine; nothing of a simulated one.

    `available` says what the system could still give, in bytes.
    """
    if spec.kind == "simulated":
        return None, tuple
    from mlx_serving.worker.engine.device_memory import MlxMemory  # imports MLX

    return MlxMemory(available), lambda: engine.kv_memories


def describe(spec: EngineSpec, engine: InferenceEngine) -> dict[str, str]:
    """Say what the engine runs on: its device, and native or twin for each accelerated piece.

    Workers publish it with their presence; call it on the engine's thread.
    """
    if spec.kind == "simulated":
        return {"device": "simulated", "acceleration": "none"}
    from mlx_serving.worker.engine.device import device_name  # imports MLX

    reports = getattr(engine, "acceleration", ())
    return {"device": device_name(), "acceleration": "; ".join(map(str, reports))}


def _load_mlx(spec: EngineSpec, settings: Settings) -> tuple[InferenceEngine, Encode]:
    # Imported here: the parent and the simulated engine must not load MLX.
    from mlx_serving.worker.engine.models import EngineOptions, load_engine
    from mlx_serving.worker.engine.prompts import PromptEncoder

    options = EngineOptions(
        max_batch_rows=settings.max_batch_rows,
        kv_budget_bytes=settings.kv_budget_bytes,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        kv_cache=settings.kv_cache,
        kv_bits=settings.kv_bits,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        lane_min_share=settings.lane_min_share,
        prefer_native=settings.native,
    )
    engine = load_engine(spec.model_path, options)
    for report in engine.acceleration:
        log.info("acceleration", piece=report.piece, implementation=report.implementation,
                 reason=report.reason)  # fmt: skip
    encode = PromptEncoder(engine.tokenizer).encode
    _warm_up(encode)
    return engine, encode


def _warm_up(encode: Encode) -> None:
    """Compile the chat template and the job's validators now, so that no job waits for it."""
    # Imported here: pydantic's models are for the child, not for whoever names an engine.
    from mlx_serving.common.jobs import GenerationJob

    job = GenerationJob.parse({"model": "warm-up", "messages": [{"role": "user", "content": "x"}]})
    with suppress(Exception):  # a template may refuse so short a conversation
        encode(GenerationJob.from_wire(job.to_wire()))


def _load_simulated(spec: EngineSpec, settings: Settings) -> tuple[InferenceEngine, Encode]:
    from mlx_serving.worker.engine.simulated import (
        SimulatedEngine,
        SimulatedOptions,
        SimulatedPromptEncoder,
    )

    rows = settings.max_batch_rows
    options = (
        SimulatedOptions(
            spec.tokens_per_second, max_rows=rows, lane_min_share=settings.lane_min_share
        )
        if spec.tokens_per_second
        else SimulatedOptions.zero_cost(rows)
    )
    return SimulatedEngine(options), SimulatedPromptEncoder().encode
