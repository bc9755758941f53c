"""Reads the entries of a job's stream: the events, as they were published."""

from __future__ import annotations

from typing import Any, Final

from mlx_serving.common import events
from mlx_serving.common.protocol.fields import TOKENS_OPENING, EntryField


def payloads(entries: Any) -> list[bytes]:  # noqa: ANN401 -- redis-py's own union
    """Event payloads of a job's stream, as they were published.

    An entry leaves out how its event begins (`entry_of` in the Lua prelude); one that is no event
    of ours reads as a corrupt one.
    """
    return [_payload(entry_id, fields) for entry_id, fields in entries]


_WRITER, _BODY, _TOKENS = (field.encode() for field in EntryField)
_TOKENS_OPENING: Final = TOKENS_OPENING.encode()


def _payload(entry_id: bytes, fields: dict[bytes, bytes]) -> bytes:
    writer = fields.get(_WRITER)
    if writer is None:  # a foreign hand's: it is read as it is
        return fields.get(_BODY, b"")
    epoch, _, tag = writer.partition(b"-")
    opening = events.opening(epoch, tag, entry_id.partition(b"-")[0])
    tokens = fields.get(_TOKENS)
    return opening + (fields.get(_BODY, b"") if tokens is None else _TOKENS_OPENING + tokens)
