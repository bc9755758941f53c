"""From a claimed job to a request for the engine: decode, resume, tokenize."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mlx_serving.common import events
from mlx_serving.common.errors import EngineError, MlxServingError, StreamGap
from mlx_serving.worker.engine.sequence import Request, SamplingParams
from mlx_serving.worker.held import Committed
from mlx_serving.worker.payload import read_job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.calls import ClaimedJob
    from mlx_serving.common.jobs import GenerationJob
    from mlx_serving.worker.engine.sequence import ModelInfo


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
    if [e.seq for e in decoded] != list(range(1, seq + 1)):
        message = f"the job's stream does not hold its events 1 to {seq}"
        raise StreamGap(message)
    deltas = [d for e in decoded for d in e.choices if d.index == 0]
    attempt = next((e for e in reversed(decoded) if e.type == events.ATTEMPT), None)
    return Committed(
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        text="".join(d.text for d in deltas),
        model_revision=attempt.model_revision if attempt else None,
        tokenizer_hash=attempt.tokenizer_hash if attempt else None,
    )


def check_continues(committed: Committed, model: ModelInfo) -> None:
    """Refuse to continue another model's tokens.

    Raises:
        JobRefusedError: the revision or the tokenizer differs.

    """
    if not committed.token_ids:
        return
    same = (committed.model_revision, committed.tokenizer_hash) == (
        model.revision,
        model.tokenizer_hash,
    )
    if not same:
        message = "earlier tokens came from another revision of the model; they can't be continued"
        raise JobRefusedError("model_changed", message)


def open_payload(claimed: ClaimedJob, limit: int) -> GenerationJob:
    """Read the job out of its claim.

    Raises:
        JobRefusedError: with the code of what is wrong, found by the claim or here.

    """
    if claimed.problem:
        code, _, name = claimed.problem.partition(":")
        raise JobRefusedError(code, f"{name}: {PROBLEMS.get(code, 'is not accepted')}")
    try:
        return read_job(claimed.data, limit=limit)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None


PROBLEMS = {
    "forbidden_field": "callbacks, webhooks, dependencies, repeats and rate limits are not run",
    "payload_too_large": "the compressed payload is over this worker's limit",
    "corrupt_job": "the RQ job has none",
}


def build_request(
    job_id: str,
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
    seed = job.seed if job.seed is not None else _seed_of(job_id)
    sampling = SamplingParams(job.temperature, job.top_p, job.top_k, job.min_p, seed)
    return Request(
        id=job_id, prompt=prompt, sampling=sampling, max_tokens=job.max_tokens,
        stop=tuple(job.stop), committed=committed.token_ids,
    )  # fmt: skip


def _seed_of(job_id: str) -> int:
    """Seed of a job that RQ's own tools enqueued, unresolved: the same for every attempt."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8])
