"""How many KV tokens the rows of a batch can come to hold. Pure.

What a batch reserves depends on its cache: mlx-lm's batch caches pad every row to the longest
one, so it is rows x widest row; a paged cache takes the sum of the rows' blocks, where those that
rows share in the prefix cache count once. Blocks that no row uses count as free. A parked row
whose keys and values are kept counts for what it holds, any other parked row for nothing.
"""

from collections import Counter
from collections.abc import Iterable

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.row import Phase, Request, Row
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits


class Reservation:
    """What active rows reserve, and what parked ones hold."""

    _in_flight = 0  # tokens of a row that leaves, which the host has not read

    def __init__(self, limits: SchedulerLimits, prefixes: PrefixCache | None = None) -> None:
        """Start empty; `prefixes` has the blocks of the decode batch's own cache."""
        self._limits = limits
        self._prefixes = prefixes
        self._widths: dict[Row, int] = {}  # of active rows
        self._kept: dict[Row, int] = {}  # of parked rows
        self._widest = 0  # of active rows
        self._total = 0  # their sum, without what the prefix cache counts
        self._lane_min_rows = limits.batch.lane_min_rows
        self._rows = [0] * len(LANES)  # active, by lane
        self._kv_tokens = [0] * len(LANES)  # widths of these

    @property
    def rows(self) -> int:
        """Active rows."""
        return len(self._widths)

    @property
    def by_lane(self) -> tuple[int, ...]:
        """Active rows of each lane."""
        return tuple(self._rows)

    @property
    def used(self) -> int:
        """KV tokens reserved."""
        if self._limits.kv_block_tokens:
            return self._total + self._held_blocks * self._limits.kv_block_tokens
        return len(self._widths) * self._widest + sum(self._kept.values())

    @property
    def over(self) -> int:
        """KV tokens reserved beyond the budget; negative where there are some left."""
        return self.used - self._limits.kv_capacity_tokens

    @property
    def _held_blocks(self) -> int:
        """Blocks of the prefix cache that rows use, each counted once."""
        return self._prefixes.held if self._prefixes else 0

    def has_share(self, rank: int, without: Row | None = None) -> bool:
        """Say whether a lane's active rows are its share, also when one of them leaves."""
        rows, kv_tokens = self._rows[rank], self._kv_tokens[rank]
        if without is not None:
            rows, kv_tokens = rows - 1, kv_tokens - self._widths[without]
        return self._limits.is_share(rows, kv_tokens)

    def row_limit(self, rank: int) -> int:
        """Rows of all lanes up to which one of this lane may enter."""
        batch = self._limits.batch
        beyond = rank == 0 or self._rows[rank] < self._lane_min_rows
        return batch.most_rows if beyond else batch.max_rows

    def keeps(self, row: Row) -> bool:
        """Say whether a parked row's keys and values are there."""
        return row in self._kept

    def alone(self, choices: Iterable[Request]) -> int:
        """KV tokens that requests need where nothing else is."""
        widths = [self._width(request) for request in choices]
        return sum(widths) if self._limits.kv_block_tokens else len(widths) * max(widths)

    def can_add(self, choices: tuple[Request, ...]) -> bool:
        """Say whether there is room for choices, whatever the prefix cache knows of them."""
        widths = [self._width(request) for request in choices]
        rows = self.rows + len(widths)
        if rows > self.row_limit(choices[0].rank):
            return False
        if self._limits.kv_block_tokens:
            return self.over + sum(widths) <= 0
        needed = rows * max(self._widest, *widths) + sum(self._kept.values())
        return needed <= self._limits.kv_capacity_tokens

    def _width(self, request: Request) -> int:
        return self._rounded(request.kv_tokens)

    def _rounded(self, tokens: int) -> int:
        block = self._limits.kv_block_tokens or 1
        return -(-(tokens + self._limits.kv_row_overhead_tokens) // block) * block

    def add(self, row: Row) -> None:
        """Reserve all that a new row, or one that was parked, can need."""
        width = self._width(row.request)
        self._total += width - self._kept.pop(row, 0)
        self._widths[row] = width
        self._widest = max(self._widest, width)
        self._count(row, 1, width)

    def remove(self, row: Row) -> None:
        """Give back all that a row has."""
        if row in self._widths:
            self._leave(row)
        self.drop(row)

    def park(self, row: Row) -> None:
        """Reserve no more than what an active row holds now; one that waits holds nothing."""
        width = self._leave(row)
        if row.phase is not Phase.DECODING:
            self._unshare(row)
            return
        held = min(self._rounded(row.context_length + self._in_flight), width)
        self._kept[row] = held
        self._total += held

    def drop(self, row: Row) -> None:
        """Give back what a parked row holds."""
        self._total -= self._kept.pop(row, 0)
        self._unshare(row)

    def _leave(self, row: Row) -> int:
        width = self._widths.pop(row)
        self._total -= width
        self._count(row, -1, -width)
        if width == self._widest:
            self._widest = max(self._widths.values(), default=0)
        return width

    def _count(self, row: Row, rows: int, kv_tokens: int) -> None:
        self._rows[row.request.rank] += rows
        self._kv_tokens[row.request.rank] += kv_tokens

    def share(self, row: Row, tokens: int) -> None:
        """Leave so many of the row's tokens to the prefix cache to count."""
        self._total += row.shared - tokens
        row.shared = tokens

    def _unshare(self, row: Row) -> None:
        self.share(row, 0)

    # What the prefix cache knows of rows that wait for their prefill

    def look_up(self, row: Row) -> None:
        """Let a row that waits hold what is known of its context by now."""
        if self._prefixes is None:
            return
        key, block = row.context_key, self._limits.kv_block_tokens
        held = row.prefix
        row.prefix, row.found = self._prefixes.pin(key)
        self._prefixes.unpin(held)
        whole = row.found // block * block
        self.share(row, whole)
        # A block that the row uses in part, it will have to have for itself too.
        if row.found > whole and self.over > 0:
            held = row.prefix
            whole_key = PrefixKey(key.salt, key.tokens[: whole * TOKEN_BYTES])
            row.prefix, row.found = self._prefixes.pin(whole_key)
            self._prefixes.unpin(held)
        row.prefilled = row.found

    def let_go(self, row: Row) -> None:
        """Let a row hold nothing that it has not in its own blocks."""
        if self._prefixes is not None:
            held, row.prefix = row.prefix, []
            self._prefixes.unpin(held)

    def joined(self, row: Row) -> None:
        """Note that a row has its own blocks, of which the prefix cache counts the full ones."""
        if self._prefixes is not None:
            block = self._limits.kv_block_tokens
            self.let_go(row)
            self.share(row, row.context_length // block * block)


class Trial(Reservation):
    """What a reservation would be; changes neither it nor any row."""

    _in_flight = 1

    def __init__(self, of: Reservation, rank: int) -> None:
        """Begin with what is, for a row of a lane that is to enter."""
        vars(self).update(vars(of))
        self._row_limit = of.row_limit(rank)
        self._widths, self._kept = dict(self._widths), dict(self._kept)
        self._rows, self._kv_tokens = [*self._rows], [*self._kv_tokens]
        self._added: list[Row] = []
        self._known: dict[Row, list[int]] = {}  # blocks that the prefix cache has of new rows
        self._freed: Counter[int] = Counter()  # blocks of the prefix cache → rows that left them

    def add(self, row: Row) -> None:
        """See `Reservation.add`."""
        if row not in self._kept:
            self._added.append(row)
        super().add(row)

    @property
    def fits(self) -> bool:
        """Whether there are as many rows and KV tokens."""
        return self.fits_rows and self.fits_kv

    @property
    def fits_rows(self) -> bool:
        """Whether there are as many rows."""
        return self.rows <= self._row_limit

    @property
    def fits_kv(self) -> bool:
        """Whether there are as many KV tokens, seeing what the prefix cache knows of new rows."""
        over = self.over
        return over <= 0 or over <= self._savings()

    def share(self, row: Row, tokens: int) -> None:
        """Note that a row leaves its part of the prefix cache."""
        del tokens
        self._total += row.shared
        if self._prefixes is None or not (row.shared or row.prefix):
            return
        key = row.context_key
        shared = PrefixKey(key.salt, key.tokens[: row.shared * TOKEN_BYTES])
        self._freed.update(row.prefix or self._prefixes.find(shared))

    @property
    def _held_blocks(self) -> int:
        return super()._held_blocks - sum(map(self._is_idle, self._freed))

    def _is_idle(self, block: int) -> bool:
        return self._prefixes is not None and (
            self._prefixes.owners(block) - self._freed[block] <= 1
        )

    def _savings(self) -> int:
        """KV tokens that new rows need not have for themselves."""
        if self._prefixes is None:
            return 0
        found = 0
        newly_held: set[int] = set()
        for row in self._added:
            blocks = self._blocks_of(row)
            found += len(blocks)
            newly_held |= set(filter(self._is_idle, blocks))
        return (found - len(newly_held)) * self._limits.kv_block_tokens

    def _blocks_of(self, row: Row) -> list[int]:
        if row not in self._known and self._prefixes is not None:
            try:
                self._known[row] = self._prefixes.find(row.context_key)
            except OverflowError:  # no such token; `Engine.add` refuses it by name
                self._known[row] = []
        return self._known.get(row, [])
