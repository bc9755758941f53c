"""Who is admitted, and whose prompt is prefilled next. Pure: no mlx, no clock, no I/O.

A row is admitted when the KV cache of all admitted rows, each as long as it can ever get, fits
the budget. mlx-lm's batch caches pad every row to the longest one, so what a batch reserves is
rows x widest row, not the sum of its rows.

One engine step does at most one prefill chunk and one decode step. A chunk computes at most
`prefill_chunk_tokens` tokens, padding included: either the next part of one long prompt or
several whole prompts from the head of the queue. So decoding rows wait for one chunk at most,
prompts are served first in, first out, and none starves: each step moves the oldest one on.
"""

from collections import deque
from dataclasses import dataclass

from mlx_serving.worker.engine.sequence import Phase, Request, RequestRefusedError, Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What bounds a batch.

    `kv_row_overhead_tokens`: KV tokens that a row may hold beyond its own (the cache grows in
    blocks; layers of fixed size). `kv_capacity_tokens` is the budget of the whole batch.
    """

    max_rows: int
    kv_capacity_tokens: int
    prefill_chunk_tokens: int
    kv_row_overhead_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("max_rows", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                message = f"{name} must be at least 1, got {getattr(self, name)}"
                raise ValueError(message)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One forward pass of prefill: tokens [start, start + length) of every row's context.

    More than one row only where the whole context of each of them fits.
    """

    rows: tuple[Sequence, ...]
    start: int
    length: int

    @property
    def completes(self) -> bool:
        """Whether the rows' contexts are in the cache after this chunk."""
        return all(self.start + self.length >= row.context_length for row in self.rows)


class Scheduler:
    """Admission, the FIFO of prompts, and the set of decoding rows."""

    def __init__(self, limits: SchedulerLimits) -> None:
        """Start empty."""
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._prefilling: tuple[Sequence, ...] = ()
        self._decoding: dict[Sequence, None] = {}  # an ordered set
        self._rows: dict[tuple[str, int], Sequence] = {}
        self._widest = 0

    def fits(self, request: Request) -> bool:
        """Say whether the request could run here if it were alone."""
        return self._width(request) <= self.limits.kv_capacity_tokens

    def can_add(self, request: Request) -> bool:
        """Say whether the request can be admitted now."""
        rows = len(self._rows) + 1
        width = max(self._widest, self._width(request))
        return rows <= self.limits.max_rows and rows * width <= self.limits.kv_capacity_tokens

    def add(self, request: Request) -> Sequence:
        """Admit the request, to the end of the queue.

        Raises:
            RequestRefusedError: with `code` "duplicate_request", "too_large" or "no_room".
        """
        if (request.id, request.choice) in self._rows:
            message = f"id: choice {request.choice} of request {request.id} is already here"
            raise RequestRefusedError("duplicate_request", message)
        if not self.fits(request):
            message = (
                f"max_tokens: the request needs {self._width(request)} KV tokens, "
                f"this device holds {self.limits.kv_capacity_tokens}"
            )
            raise RequestRefusedError("too_large", message)
        if not self.can_add(request):
            raise RequestRefusedError("no_room", "the batch has no room for this request now")
        sequence = Sequence(request)
        self._rows[request.id, request.choice] = sequence
        self._waiting.append(sequence)
        self._widest = max(self._widest, self._width(request))
        return sequence

    def find(self, request_id: str) -> list[Sequence]:
        """Return every admitted choice of the request."""
        return [row for (key, _), row in self._rows.items() if key == request_id]

    def remove(self, sequence: Sequence) -> None:
        """Forget a row in whatever phase it is and give its reservation back."""
        key = (sequence.request.id, sequence.request.choice)
        if self._rows.pop(key, None) is None:
            return
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.PREFILLING:
            self._prefilling = tuple(row for row in self._prefilling if row is not sequence)
        else:
            del self._decoding[sequence]
        if self._width(sequence.request) == self._widest:
            widths = (self._width(row.request) for row in self._rows.values())
            self._widest = max(widths, default=0)

    def schedule_prefill(self) -> PrefillChunk | None:
        """Choose the next prefill chunk; None when no prompt is pending."""
        if not self._prefilling:
            self._prefilling = tuple(self._take_waiting())
            for row in self._prefilling:
                row.phase = Phase.PREFILLING
        if not self._prefilling:
            return None
        start = self._prefilling[0].prefilled
        remaining = max(row.context_length for row in self._prefilling) - start
        length = min(remaining, self.limits.prefill_chunk_tokens)
        return PrefillChunk(self._prefilling, start, length)

    def finish_prefill(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether its rows decode from now on."""
        for row in chunk.rows:
            row.prefilled = min(chunk.start + chunk.length, row.context_length)
        if not chunk.completes:
            return False
        for row in chunk.rows:
            row.phase = Phase.DECODING
            self._decoding[row] = None
        self._prefilling = ()
        return True

    def _take_waiting(self) -> list[Sequence]:
        """Take one prompt, or as many short ones as fit one chunk when padded alike."""
        taken: list[Sequence] = []
        longest = 0
        while self._waiting:
            longest = max(longest, self._waiting[0].context_length)
            if taken and (len(taken) + 1) * longest > self.limits.prefill_chunk_tokens:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _width(self, request: Request) -> int:
        return request.kv_tokens + self.limits.kv_row_overhead_tokens

    @property
    def running(self) -> int:
        """Decoding rows."""
        return len(self._decoding)

    @property
    def waiting(self) -> int:
        """Admitted rows that don't decode yet."""
        return len(self._rows) - len(self._decoding)

    @property
    def has_work(self) -> bool:
        """Whether any row is admitted."""
        return bool(self._rows)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved: rows x widest row."""
        return len(self._rows) * self._widest
