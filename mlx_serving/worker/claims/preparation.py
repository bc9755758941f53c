"""From a claimed job to what its model is to decode: read, resumed, tokenized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_serving.common.errors import CorruptEvent
from mlx_serving.common.telemetry import trace_id
from mlx_serving.worker.claims.intake import (
    build_requests,
    can_continue,
    open_payload,
    plan_output,
    read_committed,
)
from mlx_serving.worker.delivery.choice import Committed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.signing import Signer
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.loading import LoadedModel
    from mlx_serving.worker.runner import Choices


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a job is read: whose signature it needs, how large it may be."""

    signer: Signer
    max_payload_bytes: int

    def requests(self, held: HeldJob, payloads: Sequence[bytes], loaded: LoadedModel) -> Choices:
        """A request for each choice that has not ended, to be decoded by its model.

        `payloads` are the events that earlier attempts wrote.

        Raises:
            JobRefusedError: the job can't be run.
            CorruptEvent: the stream does not hold what the job says.
            StreamGap: it does not hold all of it.

        """
        claimed, committed, model = held.claimed, Committed(), loaded.engine.model_info
        held.spell = loaded.spell
        if claimed.seq:
            committed = read_committed(payloads, claimed.seq)
            held.resume(committed)  # first: also a job that is refused keeps what it has
        job = open_payload(claimed, self.max_payload_bytes, self.signer)
        held.trace_id = trace_id(job.traceparent) if job.traceparent else ""
        if len(held.choices) > job.n:
            raise CorruptEvent("the job's stream holds more choices than the job asks for")
        held.expect(job.n)
        if claimed.seq and not can_continue(committed, model, job):
            committed = Committed()
            held.restart()
        requests = build_requests(claimed, job, committed, loaded.encode, model.vocab_size)
        held.prompt_tokens = len(requests[0].prompt)
        held.model, held.model_name = model, job.model
        left = [r for r in requests if not held.choices[r.choice].finish_reason]
        return plan_output(loaded.plan, job, left)
