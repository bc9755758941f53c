"""From a claimed job to a request for the engine: decode, resume, tokenize."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

from mlx_serving.common import events
from mlx_serving.common.errors import CorruptJob, EngineError, MlxServingError, StreamGap
from mlx_serving.common.signing import Signer
from mlx_serving.worker.engine.sequence import (
    FINISH_ERROR,
    Output,
    Request,
    RowError,
    SamplingParams,
)
from mlx_serving.worker.held import Committed
from mlx_serving.worker.payload import read_job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.calls import ClaimedJob
    from mlx_serving.common.events import ChoiceDelta, Event
    from mlx_serving.common.jobs import GenerationJob
    from mlx_serving.worker.engine.sequence import ModelInfo
    from mlx_serving.worker.held import HeldJob

UNSIGNED = Signer()


class JobRefusedError(Exception):
    """The job can't be run; `code` says why, and ends up in its result."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def read_committed(payloads: Sequence[bytes], seq: int) -> Committed:
    """What the events of earlier attempts hold.

    Raises:
        StreamGap: they are not exactly 1 … `seq`.

    """
    decoded = [events.decode(p) for p in payloads]
    # Counted first: a control hash may name any seq, and a range is compared item by item.
    if len(decoded) != seq or [e.seq for e in decoded] != list(range(1, seq + 1)):
        message = f"the job's stream does not hold its events 1 to {seq}"
        raise StreamGap(message)
    return _committed(decoded)


def _committed(decoded: Sequence[Event]) -> Committed:
    """What counts since the last reset. Tokens are the model's whose attempt wrote them.

    That is not always the last attempt's: one may have died between its first two events.
    """
    deltas: list[ChoiceDelta] = []
    opened: Event | None = None  # the attempt under way
    author: Event | None = None  # the attempt that wrote the deltas
    for event in decoded:
        if event.type == events.ATTEMPT:
            opened = event
        elif event.type == events.RESET:
            deltas.clear()
        own = [delta for delta in event.choices if delta.index == 0]
        author = opened if own else author
        deltas += own
    return Committed(
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        text="".join(d.text for d in deltas),
        model_revision=author.model_revision if author else None,
        tokenizer_hash=author.tokenizer_hash if author else None,
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
    )


def can_continue(committed: Committed, model: ModelInfo, job: GenerationJob) -> bool:
    """Whether this model goes on from there; False where it begins anew, as the job allows.

    Raises:
        JobRefusedError: the revision or the tokenizer differs (`model_changed`).

    """
    author = (committed.model_revision, committed.tokenizer_hash)
    same = author == (model.revision, model.tokenizer_hash)
    # Where only the end is missing, no model has anything to add.
    if same or not committed.token_ids or committed.finish_reason:
        return True
    if job.on_model_change == "reset":
        return False
    message = "earlier tokens came from another revision of the model; they can't be continued"
    raise JobRefusedError("model_changed", message)


def ending_of(held: HeldJob) -> Output:
    """The engine's last word on a row whose tokens are all written, and only its end is not."""
    failed = held.finish_reason == FINISH_ERROR
    error = RowError(EngineError.code, "the row failed in an earlier attempt") if failed else None
    return Output(held.request_id, 0, [], "", held.finish_reason, error, held.prompt_tokens)


def open_payload(claimed: ClaimedJob, limit: int, signer: Signer = UNSIGNED) -> GenerationJob:
    """Read the job out of its claim, where its signature allows.

    Raises:
        JobRefusedError: with the code of what is wrong, found by the claim or here.

    """
    if claimed.problem:
        code, _, name = claimed.problem.partition(":")
        raise JobRefusedError(code, f"{name}: {PROBLEMS.get(code, 'is not accepted')}")
    check = partial(signer.verify, claimed.signature, claimed.job_id, claimed.queue)
    try:
        return read_job(claimed.data, limit=limit, check=check)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None
    except Exception as error:  # noqa: BLE001 -- whatever a payload makes a parser raise is its own
        message = f"data: reading the job's payload raised {type(error).__name__}"
        raise JobRefusedError(CorruptJob.code, message) from None


PROBLEMS = {
    "forbidden_field": "callbacks, webhooks, dependencies, repeats and rate limits are not run",
    "payload_too_large": "the compressed payload is over this worker's limit",
    "corrupt_job": "the RQ job has none",
}


def build_request(
    claimed: ClaimedJob,
    job: GenerationJob,
    committed: Committed,
    encode: Callable[[GenerationJob], tuple[int, ...]],
) -> Request:
    """Tokenize the prompt and carry the parameters over.

    Raises:
        JobRefusedError: the prompt can't be rendered or tokenized.

    """
    try:
        prompt = encode(job)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None
    except Exception as error:  # noqa: BLE001 -- see below
        # A chat template is foreign code: whatever it raises concerns this job alone.
        raise JobRefusedError(EngineError.code, f"messages: {type(error).__name__}") from None
    seed = job.seed if job.seed is not None else _seed_of(claimed.job_id)
    sampling = SamplingParams(job.temperature, job.top_p, job.top_k, job.min_p, seed)
    return Request(
        id=claimed.request_id, prompt=prompt, sampling=sampling, max_tokens=job.max_tokens,
        stop=tuple(job.stop), committed=committed.token_ids, salt=job.tenant or "",
    )  # fmt: skip


def _seed_of(job_id: str) -> int:
    """Seed of a job that RQ's own tools enqueued, unresolved: the same for every attempt."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8])
