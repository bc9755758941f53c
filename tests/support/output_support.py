"""Tally with its output planner: jobs to requests, and what comes of them."""

from __future__ import annotations

import atexit
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.tally.tasks import MODEL_PATH
from mlx_serving.worker.engine.interface import (
    ParsedToolCall,
    Request,
    RequestChoice,
    RowError,
    SamplingParams,
)
from mlx_serving.worker.engine.loader import EngineOptions, load_engine
from mlx_serving.worker.engine.structured.plan import OutputPlanner
from mlx_serving.worker.engine.text.prompts import PromptEncoder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.worker.engine.engine import Engine
    from mlx_serving.worker.engine.interface import Output

ASK = [{"role": "user", "content": "json name=Ann age=34"}]


@cache
def tally() -> Engine:
    """One engine for all tests of a process; each leaves it empty."""
    return load_engine(MODEL_PATH, EngineOptions(warm_up=False), name="tally")


@cache
def planner() -> OutputPlanner:
    """One planner, whose trial process ends with this one."""
    made = OutputPlanner(tally().tokenizer, tally().model_info)
    made.warm_up()
    atexit.register(made.close)
    return made


def job(**fields: Any) -> GenerationJob:
    if "prompt" not in fields:
        fields.setdefault("messages", ASK)
    return GenerationJob.build(model="tally", **fields)


def request(made: GenerationJob, name: str = "job", committed: Iterable[int] = ()) -> Request:
    """The request of a job's first choice, planned as the worker does."""
    sampling = SamplingParams(made.temperature, made.top_p, made.top_k, made.min_p, made.seed or 0)
    plain = Request(
        f"{name}:1", PromptEncoder(tally().tokenizer).encode(made), sampling, made.max_tokens,
        stop=made.stop, choices=(RequestChoice(0, tuple(committed)),),
    )  # fmt: skip
    return planner().plan(made, plain)


@dataclass
class Row:
    """All outputs of one row, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ParsedToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    error: RowError | None = None
    outputs: list[Output] = field(default_factory=list)

    def add(self, output: Output) -> None:
        assert self.finish_reason is None, "nothing follows the last output"
        self.outputs.append(output)
        self.token_ids += output.token_ids
        self.text += output.text
        self.reasoning += output.reasoning
        self.tool_calls += output.tool_calls
        self.finish_reason, self.error = output.finish_reason, output.error


def decode(requests: Iterable[Request], engine: Engine | None = None) -> dict[str, Row]:
    """Run requests to their end, as many at once as there is room for; rows by the job's name."""
    used = engine or tally()
    pending = list(requests)
    rows = {one.id.partition(":")[0]: Row() for one in pending}
    steps = 0
    while pending or used.has_work:
        steps += 1
        assert steps < 20_000, "the engine makes no progress"
        while pending and used.can_add(pending[0]):
            used.add(pending.pop(0))
        for output in used.step():
            rows[output.request_id.partition(":")[0]].add(output)
    assert (used.running, used.waiting, used.kv_tokens_used) == (0, 0, 0)
    return rows


def decode_one(one: Request, engine: Engine | None = None) -> Row:
    (row,) = decode([one], engine).values()
    return row


def resumed(one: Request, committed: Iterable[int]) -> Request:
    """The same request in its next attempt, after these tokens."""
    choices = (RequestChoice(0, tuple(committed)),)
    return replace(one, id=one.id.partition(":")[0] + ":2", choices=choices)
