"""Who is admitted, and whose prompt is prefilled next. Pure: no mlx, no clock, no I/O.

A row is admitted when the KV cache of all admitted rows, each as long as it can ever get, fits
the budget. What a batch reserves is the cache's matter: mlx-lm's batch caches pad every row to
the longest one, so it is rows x widest row; a paged cache takes the sum of the rows' blocks, where
those that rows share in the prefix cache count once. Blocks that no row uses count as free.

One engine step does at most one prefill chunk and one decode step. A chunk computes at most
`prefill_chunk_tokens` tokens, padding included: either the next part of one long prompt or
several whole prompts from the head of the queue. So decoding rows wait for one chunk at most,
prompts are served first in, first out, and none starves: each step moves the oldest one on.
What the prefix cache knows of a prompt is looked up when its turn comes, so that prompts which
arrive together compute what they share once.

Only where many rows decode, a prompt waits a few steps for others: a chunk of one short prompt
costs the decoding rows much the same as a chunk of several.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mlx_serving.worker.engine.prefix.cache import PrefixCache
from mlx_serving.worker.engine.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.sequence import Phase, Request, RequestRefusedError, Sequence

# Of a chunk: what prompts that are computed at once may hold, known tokens included.
PACKED_CONTEXT_CHUNKS: Final = 8
ROWS_PER_PROMPT: Final = 16  # so many decoding rows make one more prompt worth waiting for
PATIENCE_STEPS: Final = 4  # the most that a prompt waits for others

Group = tuple[Sequence, ...]  # rows with one context, never empty


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What bounds a batch.

    `kv_row_overhead_tokens`: KV tokens that a row may hold beyond its own (the cache grows in
    blocks; layers of fixed size). `kv_capacity_tokens` is the budget of the whole batch.
    `kv_block_tokens`: rows are kept in blocks of so many tokens; 0: padded to the longest row.
    """

    max_rows: int
    kv_capacity_tokens: int
    prefill_chunk_tokens: int
    kv_row_overhead_tokens: int = 0
    kv_block_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("max_rows", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                message = f"{name} must be at least 1, got {getattr(self, name)}"
                raise ValueError(message)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One forward pass of prefill: tokens [start, start + length) of what each group must compute.

    That is its context after what was `found` of it in the prefix cache, which is as much in each
    group of a chunk. Rows of a group have one context, which is computed once: they are choices
    of one request. More than one group only where all that each of them must compute fits.
    """

    groups: tuple[Group, ...]
    start: int
    length: int

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """Every row of the chunk, in order of arrival."""
        return tuple(row for group in self.groups for row in group)

    @property
    def leaders(self) -> tuple[Sequence, ...]:
        """One row of each group: the ones that are computed."""
        return tuple(group[0] for group in self.groups)

    @property
    def completes(self) -> bool:
        """Whether the rows' contexts are in the cache after this chunk."""
        end = self.start + self.length
        return all(row.found + end >= row.context_length for row in self.leaders)


class Scheduler:
    """Admission, the FIFO of prompts, and the set of decoding rows."""

    def __init__(self, limits: SchedulerLimits, prefixes: PrefixCache | None = None) -> None:
        """Start empty; `prefixes` has the blocks of the decode batch's own cache."""
        self.limits = limits
        self._prefixes = prefixes
        self._waiting: deque[Group] = deque()
        self._prefilling: tuple[Group, ...] = ()
        self._decoding: dict[Sequence, None] = {}  # an ordered set
        self._rows: dict[tuple[str, int], Sequence] = {}
        self._patience = PATIENCE_STEPS
        self._widest = 0  # of the admitted rows' widths
        self._total = 0  # their sum, without what the prefix cache counts

    def fits(self, *choices: Request) -> bool:
        """Say whether the choices could run here if they were alone."""
        needed = self._reserved(len(choices), *self._widths(choices))
        return len(choices) <= self.limits.max_rows and needed <= self.limits.kv_capacity_tokens

    def can_add(self, *choices: Request) -> bool:
        """Say whether the choices can be admitted now."""
        rows = len(self._rows) + len(choices)
        widest, total = self._widths(choices)
        if rows > self.limits.max_rows:
            return False
        needed = self._reserved(rows, max(self._widest, widest), self._total + total)
        over = needed + self._held - self.limits.kv_capacity_tokens
        return over <= 0 or over <= self._savings(choices)

    @property
    def _held(self) -> int:
        """KV tokens of the prefix cache that rows use, each counted once."""
        return self._prefixes.held * self.limits.kv_block_tokens if self._prefixes else 0

    def _savings(self, choices: tuple[Request, ...]) -> int:
        """KV tokens that the choices need not have for themselves."""
        if self._prefixes is None:
            return 0
        found = 0
        newly_held: set[int] = set()
        for request in choices:
            try:
                blocks = self._prefixes.find(Sequence(request).context_key)
            except OverflowError:  # no such token; `add` refuses it by name
                return 0
            found += len(blocks)
            newly_held |= {block for block in blocks if self._prefixes.owners(block) == 1}
        return (found - len(newly_held)) * self.limits.kv_block_tokens

    def _widths(self, choices: Iterable[Request]) -> tuple[int, int]:
        """Return the widest and the sum."""
        widths = [self._width(request) for request in choices]
        return max(widths), sum(widths)

    def _reserved(self, rows: int, widest: int, total: int) -> int:
        """KV tokens that so many rows can come to hold."""
        return total if self.limits.kv_block_tokens else rows * widest

    def _width(self, request: Request) -> int:
        tokens = request.kv_tokens + self.limits.kv_row_overhead_tokens
        block = self.limits.kv_block_tokens or 1
        return -(-tokens // block) * block

    def add(self, *choices: Request) -> list[Sequence]:
        """Admit the choices of one request, all or none, to the end of the queue.

        Raises:
            RequestRefusedError: with `code` "duplicate_request", "too_large", "no_room" or
                "invalid_parameter".
        """
        self._check_choices(choices)
        if not self.fits(*choices):
            raise RequestRefusedError("too_large", self._why_too_large(choices))
        if not self.can_add(*choices):
            raise RequestRefusedError("no_room", "the batch has no room for this request now")
        rows = [Sequence(request) for request in choices]
        self._rows |= {(row.request.id, row.request.choice): row for row in rows}
        shared = not any(request.committed for request in choices)
        self._waiting.extend([tuple(rows)] if shared else [(row,) for row in rows])
        widest, total = self._widths(choices)
        self._widest = max(self._widest, widest)
        self._total += total
        for row in rows:
            self._look_up(row)
        return rows

    def _look_up(self, row: Sequence) -> None:
        """Let a row that waits hold what is known of its context by now."""
        if self._prefixes is None:
            return
        key, block = row.context_key, self.limits.kv_block_tokens
        held = row.prefix
        row.prefix, row.found = self._prefixes.pin(key)
        self._prefixes.unpin(held)
        whole = row.found // block * block
        self._share(row, whole)
        # A block that the row uses in part, it will have to have for itself too.
        if row.found > whole and self.kv_tokens_used > self.limits.kv_capacity_tokens:
            held = row.prefix
            whole_key = PrefixKey(key.salt, key.tokens[: whole * TOKEN_BYTES])
            row.prefix, row.found = self._prefixes.pin(whole_key)
            self._prefixes.unpin(held)
        row.prefilled = row.found

    def _let_go(self, row: Sequence) -> None:
        if self._prefixes is not None:
            held, row.prefix = row.prefix, []
            self._prefixes.unpin(held)

    def _share(self, row: Sequence, tokens: int) -> None:
        """Leave so many of the row's tokens to the prefix cache to count."""
        self._total += row.shared - tokens
        row.shared = tokens

    def _why_too_large(self, choices: tuple[Request, ...]) -> str:
        if len(choices) > self.limits.max_rows:
            return (
                f"n: the request needs {len(choices)} rows, "
                f"this engine decodes {self.limits.max_rows}"
            )
        needed = self._reserved(len(choices), *self._widths(choices))
        return (
            f"max_tokens: the request needs {needed} KV tokens, "
            f"this device holds {self.limits.kv_capacity_tokens}"
        )

    def _check_choices(self, choices: tuple[Request, ...]) -> None:
        first = choices[0]
        if any((c.id, c.prompt) != (first.id, first.prompt) for c in choices):
            message = "prompt: choices that are added together must share id and prompt"
            raise RequestRefusedError("invalid_parameter", message)
        numbers = [request.choice for request in choices]
        for number in numbers:
            if (first.id, number) in self._rows or numbers.count(number) > 1:
                message = f"id: choice {number} of request {first.id} is already here"
                raise RequestRefusedError("duplicate_request", message)

    def find(self, request_id: str) -> list[Sequence]:
        """Return every admitted choice of the request."""
        return [row for (key, _), row in self._rows.items() if key == request_id]

    def remove(self, sequence: Sequence) -> None:
        """Forget a row in whatever phase it is and give its reservation back."""
        key = (sequence.request.id, sequence.request.choice)
        if self._rows.pop(key, None) is None:
            return
        if sequence.phase is Phase.WAITING:
            self._waiting = deque(_without(self._waiting, sequence))
        elif sequence.phase is Phase.PREFILLING:
            self._prefilling = tuple(_without(self._prefilling, sequence))
        else:
            del self._decoding[sequence]
        self._share(sequence, 0)
        self._let_go(sequence)
        self._total -= self._width(sequence.request)
        if self._width(sequence.request) == self._widest:
            widths = (self._width(row.request) for row in self._rows.values())
            self._widest = max(widths, default=0)

    def schedule_prefill(self) -> PrefillChunk | None:
        """Choose the next prefill chunk; None when no prompt is pending."""
        if not self._prefilling and not self._waits_for_more():
            self._prefilling = tuple(self._take_waiting())
            for group in self._prefilling:
                for row in group:
                    row.phase = Phase.PREFILLING
        if not self._prefilling:
            return None
        leaders = [group[0] for group in self._prefilling]
        start = leaders[0].prefilled - leaders[0].found
        remaining = max(map(_to_compute, leaders)) - start
        length = min(remaining, self.limits.prefill_chunk_tokens)
        return PrefillChunk(self._prefilling, start, length)

    def finish_prefill(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether its rows decode from now on."""
        for row in chunk.rows:
            row.prefilled = min(row.found + chunk.start + chunk.length, row.context_length)
        if not chunk.completes:
            return False
        for row in chunk.rows:
            row.phase = Phase.DECODING
            self._decoding[row] = None
        self._prefilling = ()
        return True

    def _waits_for_more(self) -> bool:
        """Whether the next chunk is put off by a step, so that more prompts share it."""
        wanted = len(self._decoding) // ROWS_PER_PROMPT
        waits = 0 < len(self._waiting) < wanted and self._patience > 0
        if waits:
            # A prompt beside which no others fit into a chunk has nothing to wait for.
            head = self._waiting[0][0]
            self._look_up(head)
            waits = wanted * _to_compute(head) <= self.limits.prefill_chunk_tokens
        self._patience = self._patience - 1 if waits else PATIENCE_STEPS
        return waits

    def _take_waiting(self) -> list[Group]:
        """Take one prompt, or as many short ones as fit one chunk when padded alike."""
        taken: list[Group] = []
        while self._waiting:
            for row in self._waiting[0]:
                self._look_up(row)
            if taken and not self._go_together([*taken, self._waiting[0]]):
                break
            taken.append(self._waiting.popleft())
        rows = [row for group in taken for row in group]
        found = min((row.found for row in rows), default=0)
        for row in rows:
            row.found = row.prefilled = found
        return taken

    def _go_together(self, groups: list[Group]) -> bool:
        """Say whether the last group may share a chunk with those before it.

        Each begins where the least is known; more than a block is not given up for that.
        """
        chunk = self.limits.prefill_chunk_tokens
        rows = [group[0] for group in groups]
        least, most = (bound(row.found for row in rows) for bound in (min, max))
        longest = max(row.context_length for row in rows)
        return (
            most - least <= self.limits.kv_block_tokens
            and len(rows) * (longest - least) <= chunk
            and len(rows) * longest <= PACKED_CONTEXT_CHUNKS * chunk
            and not self._is_shared(rows[-1], rows[:-1])
        )

    def _is_shared(self, row: Sequence, others: list[Sequence]) -> bool:
        """Say whether others are to compute a block's worth of tokens that the row needs next.

        Then it waits a step and finds them.
        """
        if self._prefixes is None:
            return False
        end = (row.found + self.limits.kv_block_tokens) * TOKEN_BYTES
        salt, tokens = row.context_key
        firsts = [PrefixKey(key.salt, key.tokens[:end]) for key in (r.context_key for r in others)]
        return end <= len(tokens) and (salt, tokens[:end]) in firsts

    def joined(self, groups: Iterable[Group]) -> None:
        """Note that rows have their own blocks, of which the prefix cache counts the full ones."""
        if self._prefixes is not None:
            block = self.limits.kv_block_tokens
            for row in (row for group in groups for row in group):
                self._let_go(row)
                self._share(row, row.context_length // block * block)

    @property
    def running(self) -> int:
        """Decoding rows."""
        return len(self._decoding)

    @property
    def waiting(self) -> int:
        """Admitted rows that don't decode yet."""
        return len(self._rows) - len(self._decoding)

    @property
    def rows(self) -> list[Sequence]:
        """Every admitted row, in order of arrival."""
        return list(self._rows.values())

    @property
    def kv_tokens_kept(self) -> int:
        """KV tokens of the blocks in use, those that only the prefix cache owns included."""
        return self._prefixes.used * self.limits.kv_block_tokens if self._prefixes else 0

    @property
    def has_work(self) -> bool:
        """Whether any row is admitted."""
        return bool(self._rows)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows."""
        return self._reserved(len(self._rows), self._widest, self._total) + self._held


def _without(groups: Iterable[Group], leaving: Sequence) -> Iterator[Group]:
    for group in groups:
        if kept := tuple(row for row in group if row is not leaving):
            yield kept


def _to_compute(row: Sequence) -> int:
    return row.context_length - row.found
