"""How many KV tokens the device has memory for now, beside the scheduler's fixed budget. Pure."""

from collections.abc import Sequence
from typing import Final

from mlx_serving.worker.engine.sequence import Request

RELAX_LOOKS: Final = 20  # so many looks without an out-of-memory error let twice as much in


class MemoryRoom:
    """Tells whether there is memory for a request beside those that are admitted.

    A prompt is computed into a cache of its own (which begins with the known blocks that are
    gathered for it) and then copied into the batch's: until then it is there twice. So a request
    needs its keys and values, and its prompt's once more.
    """

    def __init__(self, *, block_tokens: int = 0, overhead_tokens: int = 0) -> None:
        """Know no bound yet. For the arguments see `scheduler.SchedulerLimits`."""
        self._block_tokens, self._overhead = block_tokens, overhead_tokens
        self._room: int | None = None
        self._cap: int | None = None  # after an out-of-memory error
        self._quiet_looks = 0
        self.starved = False
        self.errors = 0  # out-of-memory errors so far

    @property
    def tokens(self) -> int | None:
        """KV tokens that there is memory for, copies included; None: nobody has looked."""
        bounds = [bound for bound in (self._room, self._cap) if bound is not None]
        return min(bounds, default=None)

    def look(self, tokens: int) -> None:
        """Take what the guard found, and be a little bolder again after a quiet time."""
        self._room, self.starved = tokens, False
        self._quiet_looks += 1
        if self._cap is not None and self._quiet_looks >= RELAX_LOOKS:
            self._quiet_looks, self._cap = 0, 2 * self._cap
            if self._cap > tokens:
                self._cap = None

    def strike(self, used_tokens: int) -> None:
        """Note that the device ran out of memory with so many KV tokens reserved."""
        self.errors += 1
        self._cap, self._quiet_looks = used_tokens // 2, 0

    def forgive(self) -> None:
        """Forget the errors: what caused them is gone."""
        self._cap = None

    def admits(self, choices: Sequence[Request], *, used: int, rows: int, kept: int) -> bool:
        """Say whether there is memory for these choices of one request.

        With `used` KV tokens reserved by `rows` rows, and `kept` in blocks that exist, those that
        no row uses included. Where the caches are empty the scheduler's budget alone decides,
        unless there is no memory at all: else a job that fits would wait for good.
        """
        bound = self.tokens
        if bound is None:
            return True
        if not rows and not kept:
            return self._room != 0
        needed = self._needed(choices, used=used, rows=rows)
        copies = max(len(request.prompt) + len(request.committed) for request in choices)
        admitted = max(needed, kept) + copies <= bound
        self.starved = not admitted and kept > used and (not rows or needed + copies <= bound)
        return admitted

    def _needed(self, choices: Sequence[Request], *, used: int, rows: int) -> int:
        widths = [request.kv_tokens + self._overhead for request in choices]
        if self._block_tokens:
            return used + sum(widths)
        return (rows + len(choices)) * max(used // rows, *widths)
