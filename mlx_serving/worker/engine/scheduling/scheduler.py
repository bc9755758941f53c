"""Which requests are admitted, which rows are parked, what is prefilled next. Pure: no clock.

A row is admitted if the KV cache of all admitted rows, each as long as it can ever get, fits the
budget (`reservation`). A request of a higher lane may park rows of lower ones for that
(`parking`): `find_room` says which, `park` and `evict` note that it is done, `next_parked` and
`resume` bring them back. Prompts are computed in the order of `prompt_queue`.
"""

from collections.abc import Iterable

from mlx_serving.worker.engine.interface import LaneRows, Request, RequestRefusedError
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.chunk import ChunkSize, PrefillChunk, RowGroup
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.parking import NO_PARKING, Parking, ParkingLot, Resumption
from mlx_serving.worker.engine.scheduling.prompt_queue import PromptQueue
from mlx_serving.worker.engine.scheduling.reservation import Reservation


class Scheduler:
    """Admission, the queue of prompts, the decoding rows, and those that are parked."""

    def __init__(self, limits: SchedulerLimits, prefixes: PrefixCache | None = None) -> None:
        """Start empty; `prefixes` has the blocks of the decode batch's own cache."""
        self.limits = limits
        self._prefixes = prefixes
        self._reservation = Reservation(limits, prefixes)
        self.chunk_size = ChunkSize(
            limits.prefill_chunk_tokens, limits.first_chunk_tokens, limits.step_seconds
        )
        self._prompts = PromptQueue(limits, self.chunk_size, self._reservation, prefixes)
        self._parked = ParkingLot(limits, self._reservation)
        self._decoding: dict[Row, None] = {}  # an ordered set
        self._rows: dict[tuple[str, int], Row] = {}
        self._admitted = 0

    def fits(self, request: Request) -> bool:
        """Say whether the request fits if nothing else is here."""
        rows, needed = len(request.choices), self._reservation.alone(request.kv_tokens)
        return rows <= self.limits.batch.max_rows and needed <= self.limits.kv_capacity_tokens

    def can_add(self, request: Request) -> bool:
        """Say whether the request can be admitted now, if need be by parking others."""
        return self._parked.find_room(request, self._rows.values()) is not None

    def find_room(self, request: Request) -> Parking:
        """Say which rows have to be parked and evicted before `add` takes the request.

        Raises:
            RequestRefusedError: as `add` does.
        """
        self._check_choices(request)
        if not self.fits(request):
            raise RequestRefusedError("too_large", self._why_too_large(request))
        parking = self._parked.find_room(request, self._rows.values())
        if parking is None:
            raise RequestRefusedError("no_room", "the batch has no room for this request now")
        return parking

    def add(self, request: Request) -> list[Row]:
        """Admit all choices of a request, or none, to the end of their lane's queue.

        Raises:
            RequestRefusedError: with `code` "duplicate_request", "too_large", "no_room" or
                "invalid_parameter".
        """
        if self.find_room(request) != NO_PARKING:
            raise RequestRefusedError("no_room", "others are to be parked first")
        return self.admit(request)

    def admit(self, request: Request) -> list[Row]:
        """Admit a request for which `find_room` has just answered `NO_PARKING`; see `add`."""
        rows = [Row(request, choice, order=self._admitted) for choice in request.choices]
        self._admitted += 1
        for row in rows:
            self._rows[request.id, row.choice.index] = row
            self._reservation.add(row)
        shared = not any(choice.committed for choice in request.choices)
        for group in [tuple(rows)] if shared else [(row,) for row in rows]:
            self._prompts.add(group)
        return rows

    def _why_too_large(self, request: Request) -> str:
        rows = len(request.choices)
        if rows > self.limits.batch.max_rows:
            return (
                f"n: the request needs {rows} rows, "
                f"this engine decodes {self.limits.batch.max_rows}"
            )
        needed = self._reservation.alone(request.kv_tokens)
        return (
            f"max_tokens: the request needs {needed} KV tokens, "
            f"this device holds {self.limits.kv_capacity_tokens}"
        )

    def _check_choices(self, request: Request) -> None:
        indices = [choice.index for choice in request.choices]
        for index in indices:
            if (request.id, index) in self._rows or indices.count(index) > 1:
                message = f"id: choice {index} of request {request.id} is already here"
                raise RequestRefusedError("duplicate_request", message)

    def find(self, request_id: str) -> list[Row]:
        """Return every admitted row of the request."""
        return [row for (key, _), row in self._rows.items() if key == request_id]

    def is_here(self, row: Row) -> bool:
        """Say whether a row was admitted and not removed."""
        return self._rows.get((row.request.id, row.choice.index)) is row

    def remove(self, row: Row) -> None:
        """Forget a row, in whatever phase it is, and give its reservation back."""
        if not self.is_here(row):
            return
        del self._rows[row.request.id, row.choice.index]
        if row.phase is Phase.PARKED:
            self._parked.leave(row)
        else:
            self._take_out(row)
        self._reservation.remove(row)

    def _take_out(self, row: Row) -> None:
        self._decoding.pop(row, None)
        self._prompts.remove(row)

    # Parking

    def park(self, row: Row) -> None:
        """Note that a row left the batch; if it decoded, its keys and values are kept."""
        self._take_out(row)
        self._reservation.park(row)
        row.phase = Phase.PARKED
        self._parked.enter(row)

    def evict(self, row: Row) -> None:
        """Note that a parked row's keys and values are gone, if it had any."""
        self._reservation.evict(row)

    def next_parked(self) -> Resumption | None:
        """Say which parked row continues now, and which to evict for it; None: none continues."""
        return self._parked.next() if len(self._parked) else None

    def resume(self, row: Row) -> bool:
        """Let a parked row continue; returns whether it decodes. If not, its prompt is queued."""
        kept = self._reservation.keeps(row)
        self._parked.leave(row)
        self._reservation.add(row)
        if kept:
            row.phase = Phase.DECODING
            self._decoding[row] = None
        else:
            row.begin_prefill(cached_tokens=0)
            self._prompts.add((row,))
        return kept

    # Prefill

    def schedule_prefill(self) -> PrefillChunk | None:
        """Choose the next prefill chunk; None if no prompt is pending, or the next one waits."""
        return self._prompts.schedule(len(self._decoding))

    def chunks_of(self, group: RowGroup) -> list[PrefillChunk]:
        """Return the chunks of one prompt, computed by itself from its beginning."""
        length, most = group[0].context_length, self.chunk_size.tokens
        starts = range(0, max(1, length), most)
        return [PrefillChunk((group,), start, min(most, length - start)) for start in starts]

    def is_alone_in_prefill(self, row: Row) -> bool:
        """Say whether the row's lane prefills this row and no other."""
        return self._prompts.begun(row.request.rank) == ((row,),)

    def finish_prefill(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether its rows now decode."""
        done = self._prompts.finish(chunk)
        if done:
            self._decoding |= dict.fromkeys(chunk.rows)
        return done

    def join(self, groups: Iterable[RowGroup]) -> None:
        """Note that rows have their own blocks: the prefix cache counts the full ones."""
        for row in (row for group in groups for row in group):
            row.prefill = self._reservation.join(row)

    # Numbers

    @property
    def running(self) -> int:
        """Decoding rows."""
        return len(self._decoding)

    @property
    def waiting(self) -> int:
        """Admitted rows that don't decode yet."""
        return len(self._rows) - len(self._decoding) - len(self._parked)

    @property
    def parked(self) -> int:
        """Parked rows."""
        return len(self._parked)

    @property
    def lane_rows(self) -> LaneRows:
        """Rows by lane."""
        return LaneRows(self._reservation.by_lane, self._parked.by_lane)

    @property
    def admitted(self) -> int:
        """Admitted rows, in whatever phase."""
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """Every admitted row, in order of admission."""
        return list(self._rows.values())

    @property
    def kv_tokens_kept(self) -> int:
        """KV tokens of the blocks in use, including blocks that only the prefix cache owns."""
        return self._prefixes.used * self.limits.kv_block_tokens if self._prefixes else 0

    @property
    def has_work(self) -> bool:
        """Whether any row is admitted."""
        return bool(self._rows)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows."""
        return self._reservation.used
