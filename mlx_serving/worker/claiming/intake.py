"""From a claimed job to requests for the engine: read it, check it, resume it, tokenize it."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common import events, limits
from mlx_serving.common.errors import (
    ContextLengthExceeded,
    CorruptEvent,
    CorruptJob,
    EngineError,
    ForeignFunction,
    MlxServingError,
    PayloadTooLarge,
    StreamGap,
)
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.common.queues import lane_of, model_of
from mlx_serving.common.signing import Signer
from mlx_serving.common.telemetry import trace_id
from mlx_serving.common.validation import is_modest
from mlx_serving.worker.claiming.adoption import check_adopted
from mlx_serving.worker.delivery.choice import Committed, CommittedChoice
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.events import ChoiceDelta, Event
    from mlx_serving.common.protocol.calls import ClaimedJob
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.engine.interface import ModelInfo
    from mlx_serving.worker.models.loading import LoadedModel, Plan

    Encode = Callable[[GenerationJob], tuple[int, ...]]

_PARTS: Final = 4  # RQ's form: [function, instance, arguments, keyword arguments]


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes, so that a bomb costs no more than that.

    Raises:
        PayloadTooLarge: there is more.
        CorruptJob: it is not zlib.

    """
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, limit + 1)
    except zlib.error:
        message = "data: the job's payload is not zlib-compressed"
        raise CorruptJob(message) from None
    if len(raw) > limit:
        reason = f"the job's payload is over {limit} bytes when decompressed"
        raise PayloadTooLarge([("data", reason)])
    return raw


def read_job(
    data: bytes, *, limit: int, check: Callable[[bytes], None] = lambda _: None
) -> GenerationJob:
    """Decompress, check, parse and validate the payload of an RQ job.

    `check` sees the payload before it is parsed, and raises if it must not be.

    Raises:
        PayloadTooLarge, CorruptJob, ForeignFunction, InvalidJob: as their names say.

    """
    payload = inflate(data, limit)
    check(payload)
    try:
        call: Any = msgspec.json.decode(payload)
    except (ValueError, RecursionError):
        message = "data: the job's payload is not JSON"
        raise CorruptJob(message) from None
    if not isinstance(call, list) or len(call) != _PARTS:
        message = "data: the job's payload is not RQ's [function, instance, args, kwargs]"
        raise CorruptJob(message)
    function, instance, arguments, keywords = call
    if function != JOB_FUNCTION or instance is not None or keywords:
        message = f"data: the job does not name {JOB_FUNCTION}"
        raise ForeignFunction(message)
    if not isinstance(arguments, list) or len(arguments) != 1:
        message = "data: the job's function takes one argument"
        raise CorruptJob(message)
    return GenerationJob.from_wire(arguments[0], modest=is_modest(payload))


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a job is read: whose signature it needs, how large it may be."""

    signer: Signer
    max_payload_bytes: int

    def request(self, held: HeldJob, payloads: Sequence[bytes], loaded: LoadedModel) -> Request:
        """The request for the choices that have not ended, to be decoded by its model.

        `payloads` are the events that earlier attempts wrote.

        Raises:
            JobRefusedError: the job can't be run.
            NotYetAdopted: its terms are not in its control hash yet.
            CorruptEvent: the stream does not hold what the job says.
            StreamGap: it does not hold all of it.

        """
        claimed, committed, model = held.claimed, Committed(), loaded.engine.model_info
        held.spell = loaded.spell
        if claimed.seq:
            committed = read_committed(payloads, claimed.seq)
            held.resume(committed)  # first: also a job that is refused keeps what it has
        job = open_payload(claimed, self.max_payload_bytes, self.signer)
        if claimed.adopted:
            check_adopted(job)
        held.trace_id = trace_id(job.traceparent) if job.traceparent else ""
        if len(held.choices) > job.n:
            raise CorruptEvent("the job's stream holds more choices than the job asks for")
        held.expect(job.n)
        if claimed.seq and not can_continue(committed, model, job):
            committed = Committed()
            held.restart()
        request = build_request(claimed, job, committed, loaded.encode, model)
        held.prompt_tokens = len(request.prompt)
        held.model, held.model_name = model, job.model
        left = tuple(c for c in request.choices if not held.choices[c.index].finish_reason)
        return plan_output(loaded.plan, job, msgspec.structs.replace(request, choices=left))


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
        CorruptEvent: one is no event of ours.

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
    deltas: dict[int, list[ChoiceDelta]] = {}
    opened: Event | None = None  # the attempt under way
    author: Event | None = None  # the attempt that wrote the deltas
    for event in decoded:
        if event.type == events.ATTEMPT:
            opened = event
        elif event.type == events.RESET:
            deltas.clear()
        author = opened if event.choices else author
        for delta in event.choices:
            deltas.setdefault(delta.index, []).append(delta)
    if any(not 0 <= index < limits.CHOICES for index in deltas):
        message = "the job's stream holds a choice that no job has"
        raise CorruptEvent(message)
    return Committed(
        {index: _choice(own) for index, own in deltas.items()},
        model_revision=author.model_revision if author else None,
        tokenizer_hash=author.tokenizer_hash if author else None,
    )


def _choice(deltas: Sequence[ChoiceDelta]) -> CommittedChoice:
    forms = [d.logprobs for d in deltas if d.logprobs is not None]
    return CommittedChoice(
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        text="".join(d.text for d in deltas),
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
        logprobs=tuple(entry for form in forms for entry in form.content),
        reasoning="".join(d.reasoning or "" for d in deltas),
        tool_calls=tuple(part for d in deltas for part in d.tool_calls or ()),
    )


def can_continue(committed: Committed, model: ModelInfo, job: GenerationJob) -> bool:
    """Whether this model goes on from there; False if it begins anew, as the job allows.

    Raises:
        JobRefusedError: the revision or the tokenizer differs (`model_changed`).

    """
    author = (committed.model_revision, committed.tokenizer_hash)
    same = author == (model.revision, model.tokenizer_hash)
    # If only the end is missing, no model has anything to add.
    if same or not committed.has_tokens or committed.ends(job.n):
        return True
    if job.on_model_change == "reset":
        return False
    message = "earlier tokens came from another revision of the model; they can't be continued"
    raise JobRefusedError("model_changed", message)


def open_payload(claimed: ClaimedJob, limit: int, signer: Signer = UNSIGNED) -> GenerationJob:
    """Read the job out of its claim, if its signature allows.

    Raises:
        JobRefusedError: with the code of what is wrong, found by the claim or here.

    """
    if code := claimed.problem:
        reason = PROBLEMS.get(code, "is not accepted")
        raise JobRefusedError(code, f"{claimed.problem_field}: {reason}")
    check = partial(signer.verify, claimed.signature, claimed.job_id, claimed.queue)
    try:
        return read_job(claimed.data, limit=limit, check=check)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None
    except Exception as error:  # noqa: BLE001 -- a parser may raise anything, and only this job fails
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
    model: ModelInfo,
) -> Request:
    """Tokenize the prompt and carry the parameters over, for all choices.

    Raises:
        JobRefusedError: the prompt can't be rendered or tokenized, a parameter names a token that
            the model does not have, or prompt and answer are longer than its context.

    """
    try:
        prompt = encode(job)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None
    except Exception as error:  # noqa: BLE001 -- see below
        # A chat template is foreign code: what it raises concerns this job alone.
        raise JobRefusedError(EngineError.code, f"messages: {type(error).__name__}") from None
    sampling = _sampling(claimed, job, model.vocab_size)
    choices = tuple(RequestChoice(index, committed.of(index).token_ids) for index in range(job.n))
    return Request(
        id=claimed.attempt.name, prompt=prompt, sampling=sampling,
        max_tokens=fit_context(job, len(prompt), model.context_length),
        stop=job.stop, choices=choices, salt=job.tenant or "", lane=lane_of(claimed.queue),
        model=model_of(claimed.queue),
    )  # fmt: skip


def fit_context(job: GenerationJob, prompt_tokens: int, context: int | None) -> int:
    """Return the most tokens that each choice may have in a model's context.

    A job that names no `max_tokens` gets what its prompt leaves of the context.

    Raises:
        JobRefusedError: the context is too short (`context_length_exceeded`).

    """
    if context is None:
        return job.max_tokens
    left, has = context - prompt_tokens, f"and the model's context has {context}"
    if left < 1:
        field = "prompt" if job.messages is None else "messages"
        message = f"{field}: is {prompt_tokens} tokens long, {has}"
        raise JobRefusedError(ContextLengthExceeded.code, message)
    if "max_tokens" in job.model_fields_set and job.max_tokens > left:
        both = f"the prompt's {prompt_tokens} tokens and {job.max_tokens} for the answer"
        message = f"max_tokens: {both} are {prompt_tokens + job.max_tokens}, {has}"
        raise JobRefusedError(ContextLengthExceeded.code, message)
    return min(job.max_tokens, left)


def plan_output(plan: Plan, job: GenerationJob, request: Request) -> Request:
    """The request with the grammar and the format that the job asks for.

    Raises:
        JobRefusedError: the job's schema, regex, grammar or tools can't be honoured.

    """
    try:
        return plan(job, request)
    except MlxServingError as error:
        raise JobRefusedError(error.code, error.message) from None
    except Exception as error:  # noqa: BLE001 -- a grammar is foreign input to foreign code
        message = f"response_format: {type(error).__name__}"
        raise JobRefusedError(EngineError.code, message) from None


def _sampling(claimed: ClaimedJob, job: GenerationJob, vocab_size: int) -> SamplingParams:
    bias = tuple((int(token), value) for token, value in (job.logit_bias or {}).items())
    for token, _ in bias:
        if token >= vocab_size:
            message = f"logit_bias.{token}: the model's vocabulary has {vocab_size} tokens"
            raise JobRefusedError("token_out_of_vocabulary", message)
    return SamplingParams(
        job.temperature, job.top_p, job.top_k, job.min_p,
        seed=job.seed if job.seed is not None else _seed_of(claimed.job_id),
        repetition_penalty=job.repetition_penalty, presence_penalty=job.presence_penalty,
        frequency_penalty=job.frequency_penalty, logit_bias=bias,
        logprobs=(job.top_logprobs or 0) if job.logprobs else None,
    )  # fmt: skip


def _seed_of(job_id: str) -> int:
    """Seed of a job that RQ's own tools enqueued, unresolved: the same for every attempt."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8])
