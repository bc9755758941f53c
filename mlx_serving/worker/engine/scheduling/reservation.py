"""How many KV tokens the rows of a batch can come to hold. Pure.

What a batch reserves depends on its cache. mlx-lm's batch caches pad every row to the longest, so
it is rows x widest row. A paged cache takes the sum of the rows' blocks; blocks that rows share in
the prefix cache count once, and blocks that no row uses count as free. A parked row counts for
what it holds if its keys and values are kept, else for nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from msgspec.structs import replace

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.kv.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.row import Phase, Prefill, Row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.worker.engine.interface import Request
    from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
    from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits


class Reservation:
    """What active rows reserve, and what parked rows hold."""

    _unread_tokens = 0  # of a row that is parked: decoded, and not yet read by the host

    def __init__(self, limits: SchedulerLimits, prefixes: PrefixCache | None = None) -> None:
        """Start empty; `prefixes` has the blocks of the decode batch's own cache."""
        self._limits = limits
        self._prefixes = prefixes
        self._widths: dict[Row, int] = {}  # KV tokens reserved by each active row
        self._kept: dict[Row, int] = {}  # KV tokens that each parked row holds
        self._shared: dict[Row, int] = {}  # KV tokens of a row that the prefix cache counts
        self._widest = 0  # of active rows
        self._total = 0  # KV tokens of all rows, without the shared ones
        self._lane_rows = [0] * len(LANES)  # active rows of each lane
        self._lane_kv_tokens = [0] * len(LANES)  # the widths of these

    def _copy_from(self, other: Reservation) -> None:
        """Take the state of another reservation; neither changes with the other."""
        self._widths, self._kept = dict(other._widths), dict(other._kept)
        self._shared = dict(other._shared)
        self._widest, self._total = other._widest, other._total
        self._lane_rows, self._lane_kv_tokens = [*other._lane_rows], [*other._lane_kv_tokens]

    @property
    def rows(self) -> int:
        """Active rows."""
        return len(self._widths)

    @property
    def by_lane(self) -> tuple[int, ...]:
        """Active rows of each lane."""
        return tuple(self._lane_rows)

    @property
    def used(self) -> int:
        """KV tokens reserved."""
        if self._limits.kv_block_tokens:
            return self._total + self._held_blocks * self._limits.kv_block_tokens
        return len(self._widths) * self._widest + sum(self._kept.values())

    @property
    def over(self) -> int:
        """KV tokens reserved beyond the budget; negative if some are left."""
        return self.used - self._limits.kv_capacity_tokens

    @property
    def _held_blocks(self) -> int:
        """Blocks of the prefix cache that rows use, each counted once."""
        return self._prefixes.held if self._prefixes else 0

    def has_share(self, rank: int, without: Row | None = None) -> bool:
        """Say whether a lane has its share, if need be also without one of its rows."""
        rows, kv_tokens = self._lane_rows[rank], self._lane_kv_tokens[rank]
        if without is not None:
            rows, kv_tokens = rows - 1, kv_tokens - self._widths[without]
        return self._limits.is_share(rows, kv_tokens)

    def row_limit(self, rank: int) -> int:
        """A row of this lane may enter while fewer rows than this are active."""
        batch = self._limits.batch
        beyond = rank == 0 or self._lane_rows[rank] < batch.lane_min_rows
        return batch.most_rows if beyond else batch.max_rows

    def keeps(self, row: Row) -> bool:
        """Say whether a parked row's keys and values are kept."""
        return row in self._kept

    def alone(self, kv_tokens: Iterable[int]) -> int:
        """KV tokens that rows of so many KV tokens need if nothing else is there."""
        widths = list(map(self._rounded, kv_tokens))
        return sum(widths) if self._limits.kv_block_tokens else len(widths) * max(widths)

    def can_add(self, request: Request) -> bool:
        """Say whether there is room for a request even if nothing of it is cached."""
        widths = list(map(self._rounded, request.kv_tokens))
        rows = self.rows + len(widths)
        if rows > self.row_limit(request.rank):
            return False
        if self._limits.kv_block_tokens:
            return self.over + sum(widths) <= 0
        needed = rows * max(self._widest, *widths) + sum(self._kept.values())
        return needed <= self._limits.kv_capacity_tokens

    def _rounded(self, tokens: int) -> int:
        block = self._limits.kv_block_tokens or 1
        return -(-(tokens + self._limits.kv_row_overhead_tokens) // block) * block

    def add(self, row: Row) -> None:
        """Reserve all that a new row, or a parked one that continues, can need."""
        width = self._rounded(row.kv_tokens)
        self._total += width - self._kept.pop(row, 0)
        self._widths[row] = width
        self._widest = max(self._widest, width)
        self._count(row, 1, width)

    def remove(self, row: Row) -> None:
        """Give back all that a row reserves or holds."""
        if row in self._widths:
            self._deactivate(row)
        self.evict(row)

    def park(self, row: Row) -> None:
        """Reserve only what an active row holds now; a row that does not decode keeps nothing."""
        width = self._deactivate(row)
        if row.phase is not Phase.DECODING:
            self._unshare(row)
            return
        held = min(self._rounded(row.context_length + self._unread_tokens), width)
        self._kept[row] = held
        self._total += held

    def evict(self, row: Row) -> None:
        """Give back what a parked row holds."""
        self._total -= self._kept.pop(row, 0)
        self._unshare(row)

    def _deactivate(self, row: Row) -> int:
        """Take out an active row; returns its width."""
        width = self._widths.pop(row)
        self._total -= width
        self._count(row, -1, -width)
        if width == self._widest:
            self._widest = max(self._widths.values(), default=0)
        return width

    def _count(self, row: Row, rows: int, kv_tokens: int) -> None:
        self._lane_rows[row.request.rank] += rows
        self._lane_kv_tokens[row.request.rank] += kv_tokens

    def _share(self, row: Row, tokens: int) -> None:
        """Leave so many of the row's tokens to the prefix cache to count."""
        self._total += self._shared.pop(row, 0) - tokens
        if tokens:
            self._shared[row] = tokens

    def _unshare(self, row: Row) -> None:
        self._share(row, 0)

    # What the prefix cache has of rows that wait for their prefill

    def pin_prefix(self, row: Row) -> Prefill:
        """Pin what the prefix cache has by now of a waiting row's context.

        Unpins what the row had pinned before. Returns the row's prefill as it is from now on.
        """
        if self._prefixes is None:
            return row.prefill
        key, block = row.context_key, self._limits.kv_block_tokens
        blocks, tokens = self._prefixes.pin(key)
        self._prefixes.unpin(row.prefill.pinned_blocks)
        whole = tokens // block * block
        self._share(row, whole)
        # A block of which the row uses a part has to be copied: the row needs one of its own too.
        if tokens > whole and self.over > 0:
            whole_key = PrefixKey(key.salt, key.tokens[: whole * TOKEN_BYTES])
            partly = blocks
            blocks, tokens = self._prefixes.pin(whole_key)
            self._prefixes.unpin(partly)
        return replace(
            row.prefill, pinned_blocks=blocks, cached_tokens=tokens, prefilled_tokens=tokens
        )

    def unpin_prefix(self, row: Row) -> Prefill:
        """Unpin what the row had pinned; returns the row's prefill as it is from now on."""
        if self._prefixes is None:
            return row.prefill
        self._prefixes.unpin(row.prefill.pinned_blocks)
        return replace(row.prefill, pinned_blocks=[])

    def join(self, row: Row) -> Prefill:
        """Note that a row has its own blocks: the prefix cache counts the full ones.

        Returns the row's prefill as it is from now on.
        """
        if self._prefixes is not None:
            block = self._limits.kv_block_tokens
            self._share(row, row.context_length // block * block)
        return self.unpin_prefix(row)


class Trial(Reservation):
    """A copy of a reservation to try changes on; changes neither the original nor any row."""

    _unread_tokens = 1

    def __init__(self, of: Reservation, rank: int) -> None:
        """Begin with the present state, for a row of lane `rank` that is to enter."""
        super().__init__(of._limits, of._prefixes)  # noqa: SLF001 - its own kind
        self._copy_from(of)
        self._row_limit = of.row_limit(rank)
        self._added: list[Row] = []
        self._cached: dict[Row, list[int]] = {}  # blocks that the prefix cache has of new rows
        self._freed: Counter[int] = Counter()  # block of the prefix cache → rows that left it

    def add(self, row: Row) -> None:
        """See `Reservation.add`."""
        if row not in self._kept:
            self._added.append(row)
        super().add(row)

    @property
    def fits(self) -> bool:
        """Whether rows and KV tokens are within the limits."""
        return self.fits_rows and self.fits_kv

    @property
    def fits_rows(self) -> bool:
        """Whether the number of rows is within the limit."""
        return self.rows <= self._row_limit

    @property
    def fits_kv(self) -> bool:
        """Whether the KV tokens are within the budget, without what is cached of new rows."""
        over = self.over
        return over <= 0 or over <= self._savings()

    def _unshare(self, row: Row) -> None:
        """Note that a row leaves its blocks of the prefix cache."""
        shared = self._shared.get(row, 0)
        super()._unshare(row)
        pinned = row.prefill.pinned_blocks
        if self._prefixes is None or not (shared or pinned):
            return
        key = row.context_key
        shared_key = PrefixKey(key.salt, key.tokens[: shared * TOKEN_BYTES])
        self._freed.update(pinned or self._prefixes.find(shared_key))

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
            blocks = self._cached_blocks(row)
            found += len(blocks)
            newly_held |= set(filter(self._is_idle, blocks))
        return (found - len(newly_held)) * self._limits.kv_block_tokens

    def _cached_blocks(self, row: Row) -> list[int]:
        if row not in self._cached and self._prefixes is not None:
            try:
                self._cached[row] = self._prefixes.find(row.context_key)
            except OverflowError:  # no such token; `Engine.add` refuses it by name
                self._cached[row] = []
        return self._cached.get(row, [])
