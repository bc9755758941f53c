"""Who is admitted, who gives way, and whose prompt is prefilled next. Pure: no mlx, no clock.

A row is admitted when the KV cache of all admitted rows, each as long as it can ever get, fits
the budget (`reservation`). A request of a higher lane may park rows of lower ones for that
(`parking`): `make_room` says which, `park` and `drop` note that it is done, `next_parked` and
`resume` bring them back. Prompts are computed in the order of `prompt_queue`.
"""

from collections.abc import Iterable

from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.row import (
    LaneRows,
    Phase,
    Request,
    RequestRefusedError,
    Row,
)
from mlx_serving.worker.engine.scheduling.chunk import ChunkSize, Group, PrefillChunk
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.parking import NOBODY, Parking, ParkingLot
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

    def fits(self, *choices: Request) -> bool:
        """Say whether the choices could run here if they were alone."""
        rows, needed = len(choices), self._reservation.alone(choices)
        return rows <= self.limits.batch.max_rows and needed <= self.limits.kv_capacity_tokens

    def can_add(self, *choices: Request) -> bool:
        """Say whether the choices can be admitted now, were others parked for them."""
        return self._parked.make_room(choices, self._rows.values()) is not None

    def make_room(self, *choices: Request) -> Parking:
        """Say what has to be parked and dropped before `add` takes the choices.

        Raises:
            RequestRefusedError: as `add` does.
        """
        self._check_choices(choices)
        if not self.fits(*choices):
            raise RequestRefusedError("too_large", self._why_too_large(choices))
        parking = self._parked.make_room(choices, self._rows.values())
        if parking is None:
            raise RequestRefusedError("no_room", "the batch has no room for this request now")
        return parking

    def add(self, *choices: Request) -> list[Row]:
        """Admit the choices of one request, all or none, to the end of their lane's queue.

        Raises:
            RequestRefusedError: with `code` "duplicate_request", "too_large", "no_room" or
                "invalid_parameter".
        """
        if self.make_room(*choices) != NOBODY:
            raise RequestRefusedError("no_room", "others are to be parked first")
        return self.admit(*choices)

    def admit(self, *choices: Request) -> list[Row]:
        """Admit choices for which `make_room` has just asked nobody to give way; see `add`."""
        rows = [Row(request, order=self._admitted) for request in choices]
        self._admitted += 1
        for row in rows:
            self._rows[row.request.id, row.request.choice] = row
            self._reservation.add(row)
        shared = not any(request.committed for request in choices)
        for group in [tuple(rows)] if shared else [(row,) for row in rows]:
            self._prompts.add(group)
        return rows

    def _why_too_large(self, choices: tuple[Request, ...]) -> str:
        if len(choices) > self.limits.batch.max_rows:
            return (
                f"n: the request needs {len(choices)} rows, "
                f"this engine decodes {self.limits.batch.max_rows}"
            )
        return (
            f"max_tokens: the request needs {self._reservation.alone(choices)} KV tokens, "
            f"this device holds {self.limits.kv_capacity_tokens}"
        )

    def _check_choices(self, choices: tuple[Request, ...]) -> None:
        first = choices[0]
        if len(choices) > 1 and any(
            (c.id, c.prompt, c.lane) != (first.id, first.prompt, first.lane) for c in choices
        ):
            message = "prompt: choices that are added together must share id and prompt, and lane"
            raise RequestRefusedError("invalid_parameter", message)
        numbers = [request.choice for request in choices]
        for number in numbers:
            if (first.id, number) in self._rows or numbers.count(number) > 1:
                message = f"id: choice {number} of request {first.id} is already here"
                raise RequestRefusedError("duplicate_request", message)

    def find(self, request_id: str) -> list[Row]:
        """Return every admitted choice of the request."""
        return [row for (key, _), row in self._rows.items() if key == request_id]

    def is_here(self, row: Row) -> bool:
        """Say whether a row was admitted and not removed."""
        return self._rows.get((row.request.id, row.request.choice)) is row

    def remove(self, row: Row) -> None:
        """Forget a row in whatever phase it is and give its reservation back."""
        if not self.is_here(row):
            return
        del self._rows[row.request.id, row.request.choice]
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
        """Note that a row left the batch; one that decoded keeps its keys and values."""
        self._take_out(row)
        self._reservation.park(row)
        row.phase = Phase.PARKED
        self._parked.enter(row)

    def drop(self, row: Row) -> None:
        """Note that a parked row's keys and values are gone, where it had any."""
        self._reservation.drop(row)

    def next_parked(self) -> Parking | None:
        """Say which row goes on now (`park`, one row), and whose keys and values go for it."""
        return self._parked.next() if len(self._parked) else None

    def resume(self, row: Row) -> bool:
        """Let a parked row go on; returns whether it decodes. Else its prompt is queued again."""
        kept = self._reservation.keeps(row)
        self._parked.leave(row)
        self._reservation.add(row)
        if kept:
            row.phase = Phase.DECODING
            self._decoding[row] = None
        else:
            row.found = row.prefilled = 0
            self._prompts.add((row,))
        return kept

    # Prefill

    def schedule_prefill(self) -> PrefillChunk | None:
        """Choose the next prefill chunk; None when no prompt is pending."""
        return self._prompts.schedule(len(self._decoding))

    def chunks_of(self, group: Group) -> list[PrefillChunk]:
        """Return the chunks of one prompt, computed by itself from its beginning."""
        length, most = group[0].context_length, self.chunk_size.tokens
        starts = range(0, max(1, length), most)
        return [PrefillChunk((group,), start, min(most, length - start)) for start in starts]

    def is_alone_in_prefill(self, row: Row) -> bool:
        """Say whether the prefill under way of the row's lane is its own alone."""
        return self._prompts.begun(row.request.rank) == ((row,),)

    def finish_prefill(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether its rows decode from now on."""
        done = self._prompts.finish(chunk)
        if done:
            self._decoding |= dict.fromkeys(chunk.rows)
        return done

    def joined(self, groups: Iterable[Group]) -> None:
        """Note that rows have their own blocks, of which the prefix cache counts the full ones."""
        for row in (row for group in groups for row in group):
            self._reservation.joined(row)

    # What there is

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
        """Rows that gave way to others."""
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
        return self._reservation.used
