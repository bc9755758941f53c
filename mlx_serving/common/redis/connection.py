"""Connections to Redis: which server serves a model or tenant, and how to reach it.

By default redis-py sends a command again after a lost reply, up to ten times, also writes; so a
command that is not idempotent may run twice. Connections made here never do that. Callers whose
call may run twice, as all of our scripts may, use `answered`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from mlx_serving.common import defaults
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.demotion import leaving_replicas, leaving_replicas_async
from mlx_serving.common.redis.tls import (
    AsyncPlainConnection,
    AsyncTlsConnection,
    PlainConnection,
    TlsConnection,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis as AsyncRedis

    from mlx_serving.common.settings import Settings

HEALTH_CHECK_SECONDS: Final = 30
CONNECTIONS: Final = 2**31
"""Most connections of one client: as many as its callers need. redis-py's default is 100, and each
blocking stream holds one."""
RESP_VERSION: Final = 2
"""What we speak unless the URL says `?protocol=3`; replies are read in the shapes of both."""
_CONNECTIONS: Final = {"redis": PlainConnection, "rediss": TlsConnection}
_ASYNC_CONNECTIONS: Final = {"redis": AsyncPlainConnection, "rediss": AsyncTlsConnection}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One Redis (a URL, or a Sentinel service), its credentials, and our prefixes in it.

    The URL says user, database and TLS, also with Sentinels; a password in it wins over `password`.
    Times are seconds. Secrets stay out of its repr, and so out of logs.
    """

    url: str = field(default=defaults.REDIS_URL, repr=False)
    password: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_service: str = defaults.SENTINEL_SERVICE
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    connect_timeout: float = defaults.REDIS_TIMEOUT_SECONDS
    read_timeout: float = defaults.REDIS_TIMEOUT_SECONDS
    key_prefix: str = defaults.KEY_PREFIX
    rq_prefix: str = defaults.RQ_PREFIX

    @property
    def scheme(self) -> str:
        """What the URL begins with: redis, rediss or unix."""
        return self.url.partition("://")[0]

    @property
    def tls(self) -> bool:
        """Whether server and Sentinels are reached over TLS."""
        return self.scheme == "rediss"

    @property
    def keys(self) -> Keys:
        """Names of all keys on this server."""
        return Keys(self.key_prefix, self.rq_prefix)


def resolve(settings: Settings, model: str | None = None, tenant: str | None = None) -> Endpoint:
    """Which Redis serves this model and tenant: the one place that decides it.

    Today: the model's own URL (`redis.by_model`), else the one of all. `tenant` is taken now, so
    that tenants can get servers of their own without a change in any caller.
    """
    del tenant
    from mlx_serving.common.settings import rq_prefix  # pydantic: only who has settings pays for it

    given = settings.redis
    own = given.by_model.get(model) if model is not None else None
    return Endpoint(
        url=(own or given.url).get_secret_value(),
        password=_secret(given.password),
        tls_ca=_path(given.tls_ca),
        tls_cert=_path(given.tls_cert),
        tls_key=_path(given.tls_key),
        sentinels=() if own else tuple(map(_host_and_port, settings.sentinel.hosts)),
        sentinel_service=settings.sentinel.service,
        sentinel_username=settings.sentinel.username,
        sentinel_password=_secret(settings.sentinel.password),
        connect_timeout=given.timeout_seconds,
        read_timeout=given.timeout_seconds,
        key_prefix=given.key_prefix,
        rq_prefix=rq_prefix(),
    )


def resolve_shared(settings: Settings, models: Sequence[str]) -> Endpoint:
    """Return the Redis of a worker's models.

    Raises:
        InvalidSettings: they do not share one.

    """
    first = resolve(settings, models[0])
    for model in models[1:]:
        if resolve(settings, model) != first:
            reason = f"a worker's models share one Redis, and {models[0]} has another"
            raise InvalidSettings([(f"redis.by_model.{model}", reason)])
    return first


def connect(endpoint: Endpoint, *, block_seconds: float = 0.0) -> redis.Redis:
    """Open a pooled client; nothing is sent before its first command.

    `block_seconds` is the longest that a blocking command or a subscriber on this client waits
    for Redis on purpose; the read timeout starts after it.
    """
    options = _options(endpoint, block_seconds)
    if not endpoint.sentinels:
        client = redis.Redis.from_url(endpoint.url, retry=Retry(NoBackoff(), 0), **options)
        pool = client.connection_pool
        kind = _CONNECTIONS.get(endpoint.scheme, pool.connection_class)
        pool.connection_class = leaving_replicas(kind)
        return client
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        list(endpoint.sentinels),
        sentinel_kwargs=_sentinel_options(endpoint) | {"retry": Retry(NoBackoff(), 0)},
    )
    master: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        endpoint.sentinel_service,
        retry=Retry(NoBackoff(), 0),
        **options | _url_options(endpoint),
    )
    return master


def connect_async(endpoint: Endpoint, *, block_seconds: float = 0.0) -> AsyncRedis:
    """Open the asyncio twin of `connect`."""
    # Imported here: a synchronous caller should not pay for it.
    from redis.asyncio import Redis as AsyncRedis
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.asyncio.sentinel import Sentinel as AsyncSentinel

    from mlx_serving.common.redis.sentinel import SentinelRedis

    options = _options(endpoint, block_seconds)
    if not endpoint.sentinels:
        client = AsyncRedis.from_url(endpoint.url, retry=AsyncRetry(NoBackoff(), 0), **options)
        pool = client.connection_pool
        kind = _ASYNC_CONNECTIONS.get(endpoint.scheme, pool.connection_class)
        pool.connection_class = leaving_replicas_async(kind)
        return client
    sentinel = AsyncSentinel(  # type: ignore[no-untyped-call]
        list(endpoint.sentinels),
        sentinel_kwargs=_sentinel_options(endpoint) | {"retry": AsyncRetry(NoBackoff(), 0)},
    )
    master: AsyncRedis = sentinel.master_for(
        endpoint.sentinel_service,
        redis_class=SentinelRedis,
        retry=AsyncRetry(NoBackoff(), 0),
        **options | _url_options(endpoint),
    )
    return master


def _options(endpoint: Endpoint, block_seconds: float) -> dict[str, Any]:
    """Keywords of both clients; absent ones are left out, because some transports refuse them."""
    options: dict[str, Any] = {
        "socket_connect_timeout": endpoint.connect_timeout,
        "socket_timeout": endpoint.read_timeout + block_seconds,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        "max_connections": CONNECTIONS,
        "protocol": RESP_VERSION,
    }
    if endpoint.password is not None:
        options["password"] = endpoint.password
    return options | _tls_options(endpoint)


def _sentinel_options(endpoint: Endpoint) -> dict[str, Any]:
    """Keywords for the Sentinels themselves, which have credentials of their own."""
    options: dict[str, Any] = {
        "socket_connect_timeout": endpoint.connect_timeout,
        "socket_timeout": endpoint.read_timeout,
        "protocol": RESP_VERSION,
        "username": endpoint.sentinel_username,
        "password": endpoint.sentinel_password,
    }
    return options | ({"ssl": True} if endpoint.tls else {}) | _tls_options(endpoint)


def _tls_options(endpoint: Endpoint) -> dict[str, Any]:
    files = {
        "ssl_ca_certs": endpoint.tls_ca,
        "ssl_certfile": endpoint.tls_cert,
        "ssl_keyfile": endpoint.tls_key,
    }
    if not endpoint.tls:
        return {}
    return {name: path for name, path in files.items() if path is not None}


def _url_options(endpoint: Endpoint) -> dict[str, Any]:
    """What a client behind Sentinels takes from the URL: user, password, database and TLS."""
    parsed: dict[str, Any] = dict(parse_url(endpoint.url))  # type: ignore[no-untyped-call]
    options = {name: parsed[name] for name in ("username", "password") if name in parsed}
    return options | {"db": parsed.get("db", 0)} | ({"ssl": True} if endpoint.tls else {})


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _secret(value: Any) -> str | None:  # noqa: ANN401 -- SecretStr, whose import is pydantic's
    return None if value is None else str(value.get_secret_value())


def _path(value: object) -> str | None:
    return None if value is None else str(value)
