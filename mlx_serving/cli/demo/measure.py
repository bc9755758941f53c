"""What a consumer measures: time to first token, gaps between deliveries, tokens a second."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_serving.common.events import RESET

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mlx_serving.common.events import Event


def called(name: str, arguments: str) -> str:
    """A tool call as the demo shows it, before the answer to its reply."""
    return f"{name}({arguments}) → "


def shown(event: Event) -> str:
    """What an event adds to a stream's text: tool calls, then text."""
    calls = [call for choice in event.choices for call in choice.tool_calls or ()]
    functions = [call.function for call in calls if call.function is not None]
    return "".join(called(f.name or "", f.arguments) for f in functions) + event.text


@dataclass(slots=True)
class Track:
    """One stream as it comes in; times are seconds of one monotonic clock."""

    submitted_s: float
    text: str = ""
    tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    state: str = "queued"
    deliveries: list[tuple[float, int]] = field(default_factory=list)  # gap in seconds, tokens

    def add(self, event: Event, now_s: float) -> None:
        """Add an event that arrived now."""
        self.state = event.state or "running"
        self.text = "" if event.type == RESET else self.text + shown(event)
        count = sum(len(choice.token_ids) for choice in event.choices)
        if not count:
            return
        self.tokens += count
        if self.first_token_s is None or self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.deliveries.append((now_s - self.last_token_s, count))
        self.last_token_s = now_s

    @property
    def ttft_s(self) -> float | None:
        """Seconds from submit to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.submitted_s


@dataclass(frozen=True, slots=True)
class Figures:
    """All streams together. `itl_s` is a delivery's gap over its tokens, one sample a token."""

    tokens: int
    seconds: float
    ttft_s: list[float]
    itl_s: list[float]
    gaps_s: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all streams over the time from the first submit to the last token."""
        return self.tokens / self.seconds if self.seconds else 0.0


def figures(tracks: Sequence[Track]) -> Figures:
    """Sum the streams up."""
    ends = [t.last_token_s for t in tracks if t.last_token_s is not None]
    began = min((t.submitted_s for t in tracks), default=0.0)
    gaps = [(gap, count) for t in tracks for gap, count in t.deliveries]
    return Figures(
        tokens=sum(t.tokens for t in tracks),
        seconds=max(ends) - began if ends else 0.0,
        ttft_s=[t.ttft_s for t in tracks if t.ttft_s is not None],
        itl_s=[gap / count for gap, count in gaps for _ in range(count)],
        gaps_s=[gap for gap, _ in gaps],
    )


def percentile(samples: Iterable[float], share: float) -> float:
    """Nearest-rank percentile, `share` in (0, 1]; NaN of nothing."""
    ordered = sorted(samples)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
