"""What the publisher needs of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class EngineLink:
    """What a publisher tells the engine, and asks it.

    `on_gone(request_id)` is called, outside the publisher's lock, for every attempt that is not to
    be decoded any further: it failed, was cancelled, or was taken over; not where all its rows
    ended by themselves, which the engine knows. `fresh()`: whether it makes progress.
    `has(request_id)`: whether it has an attempt that it was given.
    """

    on_gone: Callable[[str], None]
    fresh: Callable[[], bool]
    has: Callable[[str], bool]
