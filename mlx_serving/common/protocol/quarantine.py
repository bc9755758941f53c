"""Keys of a wrong type: how they are moved out of the way, and the notes of what was moved.

Any hand may write under a key that jobs share, while the key does not exist: then it has another
type than it should, and every command of ours on it fails. It is renamed to
``<prefix>:quarantine:<key>:<ms>``, where it stays for a week, and noted; the work goes on. A script
does so by itself (``quarantine.lua``); for other commands see `mended`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from redis.exceptions import ResponseError

from mlx_serving.common.protocol.calls import Call
from mlx_serving.common.protocol.fields import QUARANTINED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import redis

    from mlx_serving.common.protocol.keys import Keys

T = TypeVar("T")

_MARK: Final = QUARANTINED.encode()
_WRONG_TYPE: Final = re.compile("^(Command # .* of pipeline caused error: )?WRONGTYPE ", re.DOTALL)


class QuarantinedKey(NamedTuple):
    """A key that was moved out of the way: its name, the type that it had, and where it is now."""

    key: str
    kind: str
    place: str


def split(reply: Any) -> tuple[Any, list[QuarantinedKey]]:  # noqa: ANN401 -- each script has its own
    """Split a script's reply into its own and the keys that it moved; see ``answer`` there."""
    if not isinstance(reply, list) or not reply or reply[0] not in (_MARK, QUARANTINED):
        return reply, []
    _, own, *texts = reply
    names = [_text(text) for text in texts]
    return own, [QuarantinedKey(*each) for each in zip(*[iter(names)] * 3, strict=True)]


def mend(types: Mapping[str, str]) -> Call[None]:
    """Quarantine what has another type than it should, by key."""
    return Call("mend", [text for pair in types.items() for text in pair], lambda _: None)


def is_wrong_type(reply: object) -> bool:
    """Whether Redis answered that a key has another type."""
    return isinstance(reply, ResponseError) and _WRONG_TYPE.search(str(reply)) is not None


def mended(
    run: Callable[[Call[None]], object], types: Mapping[str, str], act: Callable[[], T]
) -> T:
    """Do what reads or writes these keys; if one is of a wrong type, quarantine it and do it again.

    `run` is that of a `Protocol`.

    Raises:
        redis.RedisError: Redis fails, or we may not move the key.

    """
    try:
        return act()
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        run(mend(types))
        return act()


def read_quarantined(client: redis.Redis, keys: Keys) -> list[QuarantinedKey]:
    """Read the notes of what was moved in the last week, the last first.

    Raises:
        redis.RedisError: Redis fails.

    """
    try:
        notes = cast("list[bytes]", client.zrange(keys.quarantine(), 0, -1))
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        return []
    return [_read_note(_text(note), keys) for note in reversed(notes)]


def _read_note(note: str, keys: Keys) -> QuarantinedKey:
    kind, _, place = note.partition(" ")
    key = place.removeprefix(keys.quarantined("")).rpartition(":")[0]
    return QuarantinedKey(key, kind, place)


def _text(raw: bytes | str) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw
