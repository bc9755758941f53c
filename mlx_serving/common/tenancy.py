"""The operator's limits on tenants: kept in Redis, where the scripts check every job against them.

One hash has them all: the fields ``queued`` and ``running`` limit every tenant, the fields
``queued:<tenant>`` and ``running:<tenant>`` one tenant, and go before those. A value is a number,
or ``none`` for a tenant that the limit of all does not bind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from mlx_serving.common.errors import FieldError, InvalidSettings
from mlx_serving.common.protocol.fields import TENANT_MARK, LimitField, limit_field
from mlx_serving.common.protocol.quarantine import is_wrong_type
from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.retrying import answered
from mlx_serving.common.validation import tenant_problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    import redis

    from mlx_serving.common.redis.connection import Endpoint

T = TypeVar("T")

KINDS: Final = tuple(field.value for field in LimitField)
NONE: Final = "none"  # no limit, also if there is one of all
DEFAULT: Final = "default"  # no limit of its own
MOST: Final = 10**9


@dataclass(frozen=True, slots=True)
class TenantView:
    """What a tenant has open now, and may have; a limit is None if there is none."""

    tenant: str
    queued: int
    running: int
    queued_limit: int | None
    running_limit: int | None


@dataclass(frozen=True, slots=True)
class TenantsView:
    """Limits of every tenant that has none of its own, and the tenants with jobs or limits."""

    queued: int | None
    running: int | None
    tenants: list[TenantView]


class Tenancy:
    """Reads and sets the limits on one Redis.

    Raises:
        QueueFailure: from every call, if Redis is away or refuses us.

    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._keys = endpoint.keys
        self._redis = connect(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._redis.close()

    def limit(self, tenant: str | None, limits: Mapping[str, int | str]) -> None:
        """Set limits by kind, of one tenant or (None) of all; they hold from now on.

        Args:
            tenant: whose; None for those without a limit of their own.
            limits: ``queued`` or ``running`` → a number from 0, ``none`` or ``default``.

        Raises:
            InvalidSettings: names what is wrong; nothing is set then.

        """
        errors = [*_problems(tenant, limits)]
        if errors:
            raise InvalidSettings(errors)
        names = {k: k if tenant is None else limit_field(k, tenant) for k in limits}
        drop = DEFAULT if tenant is not None else NONE
        given = {names[kind]: str(v) for kind, v in limits.items() if v != drop}
        dropped = [names[kind] for kind, v in limits.items() if v == drop]

        def send() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                if given:
                    pipe.hset(
                        self._keys.limits(), items=[x for pair in given.items() for x in pair]
                    )
                if dropped:
                    pipe.hdel(self._keys.limits(), *dropped)
                pipe.execute()

        answered(send)

    def view(self) -> TenantsView:
        """Read all limits, and what each tenant has open."""
        raw, known = answered(self._read)
        limits = {_text(name): _text(value) for name, value in raw.items()}
        named = {name.partition(TENANT_MARK)[2] for name in limits if TENANT_MARK in name}
        tenants = sorted({*map(_text, known), *named})
        counts = answered(lambda: self._counts(tenants))
        views = [
            TenantView(tenant, *pair, *(_limit(limits, kind, tenant) for kind in KINDS))
            for tenant, pair in zip(tenants, counts, strict=True)
        ]
        queued, running = (_number(limits.get(kind)) for kind in KINDS)
        return TenantsView(queued, running, views)

    def _read(self) -> tuple[dict[bytes, bytes], set[bytes]]:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._keys.limits())
            pipe.smembers(self._keys.tenants())
            raw, known = _read(pipe)
        return raw or {}, known or set()

    def _counts(self, tenants: list[str]) -> list[tuple[int, int]]:
        keys = self._keys
        with self._redis.pipeline(transaction=False) as pipe:
            for tenant in tenants:
                pipe.scard(keys.tenant_queued(tenant))
                pipe.scard(keys.tenant_running(tenant))
            counts = [count or 0 for count in _read(pipe)]
        return list(zip(counts[::2], counts[1::2], strict=True))


def _read(pipe: redis.client.Pipeline) -> list[Any]:
    """The pipeline's replies; None for a key of a wrong type, which a script quarantines."""
    replies = pipe.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return [None if isinstance(reply, Exception) else reply for reply in replies]


def _problems(tenant: str | None, limits: Mapping[str, int | str]) -> list[FieldError]:
    errors = [*tenant_problems(tenant)]
    words = {NONE} if tenant is None else {NONE, DEFAULT}
    for kind, value in limits.items():
        if kind not in KINDS:
            errors.append(FieldError(kind, f"is no limit: give {' or '.join(KINDS)}"))
        elif value not in words and not (isinstance(value, int) and 0 <= value <= MOST):
            allowed = ", ".join(sorted(words))
            errors.append(FieldError(kind, f"must be from 0 to {MOST}, or {allowed}"))
    if not limits:
        errors.append(FieldError("", f"give at least one of {', '.join(KINDS)}"))
    return errors


def _limit(limits: Mapping[str, str], kind: str, tenant: str) -> int | None:
    """As `limit_of` in the scripts reads it."""
    own = limits.get(limit_field(kind, tenant))
    if own == NONE:
        return None
    number = _number(own)
    return _number(limits.get(kind)) if number is None else number


def _number(value: str | None) -> int | None:
    return int(value) if value is not None and re.fullmatch(r"\d{1,10}", value) else None


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
