"""What the payload of a job that RQ's own enqueue put on the list asks of the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlx_serving.common.protocol.calls import Call, iso_now
from mlx_serving.common.protocol.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.attempts import Attempt
    from mlx_serving.common.protocol.calls import Argument


class Terms(NamedTuple):
    """As `adopt.lua` takes them; the defaults are those of a job whose payload says nothing."""

    max_attempts: int = 2
    deadline_ms: int = 0  # from its enqueue; 0: none
    timeout_ms: int = 0
    abandon_ms: int = 0
    result_ttl: int = 3600
    stream: bool = True
    tenant: str = ""
    rows: int = 1


def adopt(
    worker: str, held: Sequence[tuple[Attempt, Terms]]
) -> Call[list[Refusal | Literal["OK", "FENCED"]]]:
    """Hand jobs back to their queues with their terms; a refused one is still the worker's."""
    arguments: list[Argument] = [worker, iso_now()]
    for attempt, terms in held:
        arguments += [*attempt, *(int(t) if isinstance(t, bool) else t for t in terms)]

    def parse(replies: Sequence[Any]) -> list[Refusal | Literal["OK", "FENCED"]]:
        return [_outcome(*reply) for reply in replies]

    return Call("adopt", arguments, parse)


def _outcome(first: Any, *rest: Any) -> Refusal | Literal["OK", "FENCED"]:  # noqa: ANN401 -- a reply's items
    if not rest:
        return "OK" if first in {b"OK", "OK"} else "FENCED"
    _, reason, *numbers = rest
    text = reason.decode() if isinstance(reason, bytes) else reason
    return Refusal(text, *numbers)  # type: ignore[arg-type]
