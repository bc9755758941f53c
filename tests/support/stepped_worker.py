"""A worker's own parts whose threads don't run: a test turns each of them by hand.

So a death or a hand-over falls exactly where the test says, in the code that ships.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import redis

from mlx_serving.common.protocol import calls
from mlx_serving.common.results import assemble
from mlx_serving.worker.delivery.token_text import unspelled
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.simulated import SimulatedOptions, SimulatedRunner, plan
from mlx_serving.worker.engine.text.detokenizer import Detokenizer
from mlx_serving.worker.engine.text.vocabulary import Vocabulary
from mlx_serving.worker.models.loading import EngineSpec, LoadedModel
from mlx_serving.worker.process.child import Child, ChildSpec
from tests.support.worker_process import job_events, quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.events import Event
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.protocol.calls import CommitRow
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.states import JobState
    from mlx_serving.producer.client import Client
    from mlx_serving.producer.handles import JobHandle
    from mlx_serving.worker.claiming.intake import Plan
    from mlx_serving.worker.engine.row import Row

    Encode = Callable[[GenerationJob], tuple[int, ...]]

EOS = 0


class SteppedWorker:
    """One attempt after the other: `claim`, then `step` and `flush`, then `die` or `hand_over`."""

    def __init__(
        self,
        url: str,
        engine: Engine,
        encode: Encode,
        name: str = "w",
        plan: Plan = plan,
        **changes: Any,
    ) -> None:
        settings = quick_settings(
            url, worker__flush_interval_ms=0, worker__lease_seconds=30, **changes
        )
        self.name = name
        self.child = Child(ChildSpec(settings, "tally", name, EngineSpec("simulated")))
        self._encode, self._plan = encode, plan
        self._engines = self.child.runner.engine = self.child.loaded_models.engines
        self.use(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.protocol.redis.close()
        self.child.publisher._protocol.redis.close()

    def use(self, engine: Engine) -> None:
        """Have this engine from now on."""
        self.engine = engine
        self.child.loaded_models.put(
            "tally", LoadedModel(engine, self._encode, self._plan, unspelled)
        )

    def claim(self) -> Self:
        self.child.dispatcher._claim()
        return self

    def step(self, steps: int = 1) -> None:
        """Turn the engine's loop; nothing is written."""
        for _ in range(steps):
            self.child.runner._turn(self._engines)
            self.child.runner._hand_over()  # as the next turn would at its launch

    def rows(self) -> list[CommitRow]:
        """Take what a flush would write."""
        return self.child.publisher._collect()

    def flush(self) -> None:
        self.child.publisher._commit(self.rows())

    def decode(self, tokens: int) -> None:
        """Step until so many more tokens are written, each as its own event."""
        done = 0
        while done < tokens and self.held:
            before = self._pending()
            self.step()
            if self._pending() > before:
                done += 1
                self.flush()

    def _pending(self) -> int:
        return sum(job.completion_tokens for job in self.child.publisher.held())

    @property
    def held(self) -> int:
        return len(self.child.publisher.held())

    def finish(self) -> None:
        """Run what is held to its end."""
        while self.held:
            self.step()
            if self.child.publisher.pending:
                self.flush()

    def forget(self) -> None:
        """What goes with the process: rows, and all that was not written."""
        jobs = self.child.publisher.held()
        self.child.runner.withdraw({job.request_id for job in jobs})
        for job in jobs:
            self.engine.abort(job.request_id)
        self.child.publisher.let_go(jobs)

    def hand_over(self) -> None:
        """As a drain ends: write what was decoded, then release."""
        if self.child.publisher.pending:
            self.child.publisher.drain(0)
            self.flush()
        rows = [job.returned() for job in self.child.publisher.held()]
        self.child.protocol.run(calls.release(self.name, rows))
        self.forget()

    def die(self) -> None:
        """As after `kill -9`: nothing more is written, and the leases end at once."""
        jobs = self.child.publisher.held()
        self.forget()
        protocol = self.child.protocol
        for job in jobs:
            leases = protocol.keys.leases(job.claimed.queue)
            protocol.redis.zadd(leases, {job.job_id: 1}, xx=True)
        protocol.run(calls.reap(lease_ms=0))

    def leave(self, how: str) -> None:
        """`kill` or `hand over`."""
        if how == "kill":
            self.die()
        else:
            self.hand_over()


def spelled_engine(
    text: str,
    kind: str = "byte_level",
    *,
    chunk: int = 512,
    revision: str = "r1",
    tokenizer_hash: str = "h1",
    uneven: int = 0,
    room: tuple[int, int] = (64, 1 << 30),
) -> Engine:
    """An engine that says `text`, a byte a token, then ends: token n is its nth byte.

    Choice n ends `uneven` times n bytes earlier. `room`: rows and KV tokens.
    """
    said = text.encode()
    tokens = [b"", *(_spelling(byte, kind) for byte in said)]
    vocabulary = Vocabulary(tokens, kind, {EOS})  # type: ignore[arg-type]
    info = ModelInfo("spelled", revision, tokenizer_hash, len(tokens), frozenset({EOS}))
    options = SimulatedOptions(0.0, 0.0, answer_tokens=len(said))
    rows, kv_tokens = room
    limits = SchedulerLimits(BatchSize(rows), kv_tokens, chunk)
    runner = UnevenRunner(options, len(said), uneven)
    return Engine(runner, Scheduler(limits), Detokenizer(vocabulary), info)


class UnevenRunner(SimulatedRunner):
    """Ends each choice earlier than the one before it."""

    def __init__(self, options: SimulatedOptions, length: int, uneven: int) -> None:
        super().__init__(options)
        self._length, self._uneven = length, uneven

    def _next_token(self, row: Row) -> int:
        end = self._length - self._uneven * row.choice.index
        return EOS if row.decoded >= end else super()._next_token(row)


def _spelling(byte: int, kind: str) -> bytes:
    if kind == "byte_fallback":
        return f"<0x{byte:02X}>".encode()
    return _BYTE_LEVEL[byte].encode()


def _byte_level() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(odd)}


_BYTE_LEVEL = _byte_level()


def words(job: GenerationJob) -> tuple[int, ...]:
    """One token a word, as the simulated engine's own encoder does it."""
    return (1,) * max(len((job.prompt or "").split()), 1)


def told(client: Client, handle: JobHandle) -> tuple[list[int], str, str | None, JobState]:
    """What a job's stream says, checked against the contract and against its result record."""
    stream = whole_stream(client, handle)
    deltas = [delta for event in stream for delta in event.choices]
    token_ids = [token for delta in deltas for token in delta.token_ids]
    text = "".join(delta.text for delta in deltas)
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    result: GenerationResult = client.result(handle.id, timeout=1)
    assert (result.token_ids, result.text) == (token_ids, text)
    assert len(reasons) <= 1
    assert result.finish_reason == (reasons[0] if reasons else None)
    if result.state.value == "finished":
        assert len(reasons) == 1
        assert result.usage is not None
        assert result.usage.completion_tokens == len(token_ids)
        assert deltas[-1].finish_reason
    return token_ids, text, result.finish_reason, result.state


def whole_stream(client: Client, handle: JobHandle) -> list[Event]:
    """A job's events, checked: every seq once, in order, and one end, the last."""
    stream = job_events(client, handle.id)
    assert [event.seq for event in stream] == list(range(1, len(stream) + 1))
    assert [event.type for event in stream].count("end") == 1
    assert stream[-1].type == "end"
    return stream


def told_by_choice(client: Client, handle: JobHandle) -> list[tuple[list[int], str, str | None]]:
    """What a job's stream says of each choice, checked against its result record and usage."""
    stream = whole_stream(client, handle)
    result = client.result(handle.id, timeout=1)
    assert assemble(handle.id, stream).choices == result.choices
    assert [choice.index for choice in result.choices] == list(range(len(result.choices)))
    assert result.usage is not None
    assert result.usage.completion_tokens == sum(len(c.token_ids) for c in result.choices)
    ends = [delta.index for event in stream for delta in event.choices if delta.finish_reason]
    assert len(ends) == len(set(ends))  # each choice ends once
    return [(c.token_ids, c.text, c.finish_reason) for c in result.choices]


class LostReply:
    """Runs the publisher's next commit and loses the reply."""

    def __init__(self, worker: SteppedWorker) -> None:
        self._protocol = worker.child.publisher._protocol
        self._run = self._protocol.run
        self._protocol.run = self  # type: ignore[method-assign]

    def __call__(self, call: Any) -> Any:
        self._protocol.run = self._run  # type: ignore[method-assign]
        self._run(call)
        raise redis.ConnectionError("reply lost")
