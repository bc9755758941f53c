"""The time by which a batch's window is judged: Redis's `TIME`, once looks at it agree. No I/O.

One look may be wrong, if a clock was just set or the machine just woke. A batch that has ended
stays so, and one look must not end it.
"""

from __future__ import annotations

from typing import Final

AGREE_SECONDS: Final = 10.0
"""How long looks must agree before their time is believed."""
TOLERANCE_SECONDS: Final = 2.0
"""How much two looks that agree may differ, beside the monotonic time between them."""


class WindowClock:
    """Tells the time from looks at a clock, and from the monotonic clock between them.

    Attributes:
        sure: whether looks have ever agreed for `AGREE_SECONDS`. Before that, the time is that of
            the last look.

    """

    def __init__(self) -> None:
        self.sure = False
        self._ahead_s: float | None = None  # of the monotonic clock, as it is believed
        self._looked_s: float | None = None  # the same, at the last look
        self._agree_since_s = 0.0  # monotonic

    def look(self, time_s: float, monotonic_s: float) -> None:
        """Take what the clock said at a monotonic time."""
        ahead_s, before = time_s - monotonic_s, self._looked_s
        if before is None or abs(ahead_s - before) > TOLERANCE_SECONDS:
            self._agree_since_s = monotonic_s
        self._looked_s = ahead_s
        agreed = monotonic_s - self._agree_since_s >= AGREE_SECONDS
        self.sure = self.sure or agreed
        if agreed or not self.sure:
            self._ahead_s = ahead_s

    def now_s(self, monotonic_s: float) -> float | None:
        """Seconds since the epoch; None before the first look."""
        return None if self._ahead_s is None else self._ahead_s + monotonic_s
