"""How long a reader waits for a live message before it reads Redis anyway. No I/O, no clock.

Live messages make a reader quick. Reads only make up for a lost message, so they may be rare while
messages arrive.
"""

from __future__ import annotations

from typing import Final

SILENCE_S: Final = 1.0  # a live subscription this quiet may have lost a message
POLL_S: Final = 0.25  # between reads while nothing is published to this reader
LONGEST_SILENCE_S: Final = 15.0
"""Most that a lost message costs a reader whose job waits in the queue."""


class Patience:
    """Waits that double with each read that found nothing new."""

    def __init__(self) -> None:
        self._silences = 0

    def silent(self) -> None:
        """Note that a wait brought nothing."""
        self._silences += 1

    def heard(self) -> None:
        """Note that something came: the next wait is a short one."""
        self._silences = 0

    def growing_s(self, *, live: bool) -> float:
        """Seconds of the next wait; without a subscription, they grow to one second only."""
        first_s, longest_s = (SILENCE_S, LONGEST_SILENCE_S) if live else (POLL_S, SILENCE_S)
        return min(first_s * 2.0 ** min(self._silences, 8), longest_s)
