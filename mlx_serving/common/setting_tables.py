"""The tables of settings: names, defaults, bounds and meanings. `settings.py` reads them."""

from __future__ import annotations

import json
from typing import Annotated, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    model_validator,
)

from mlx_serving.common import defaults, lifetimes, limits
from mlx_serving.common.errors import FieldError
from mlx_serving.common.job.schema import ModelName
from mlx_serving.common.validation import rules_error

PREFIX_PATTERN: Final = r"^[A-Za-z0-9_.:{}-]{1,64}$"


def _split(value: object) -> object:
    """Read `a,b` as a list: the environment has no lists."""
    return (
        tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value
    )


def _object(value: object) -> object:
    """Read JSON as a table: the environment has no tables. No error quotes it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None


def _number(value: object) -> object:
    """Read a choice of numbers: the environment has no numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


_REPLIES: Final = "replies are read as they come"
NOT_IN_URL: Final = {
    "decode_responses": _REPLIES, "encoding": _REPLIES, "encoding_errors": _REPLIES,
    "max_connections": "a client opens as many connections as it needs",
}  # fmt: skip
"""Options that redis-py reads from a URL and that would break a client of ours."""


def _usable_url(value: object) -> object:
    """Refuse what redis-py would raise at later, or read as database 0. No error quotes it."""
    if not isinstance(value, str):
        return value
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    from redis import ConnectionPool  # not before there is a URL: settings are cheap to import

    try:
        ConnectionPool.from_url(value).make_connection()  # sends nothing
        database = "" if value.startswith("unix") else urlsplit(value).path.strip("/")
    except (AttributeError, TypeError, ValueError):
        raise ValueError("is no URL of a Redis: its host, port or options are wrong") from None
    if database and not database.isdecimal():
        raise ValueError("is no URL of a Redis: its database must be a number")
    for name in parse_qs(urlsplit(value).query, keep_blank_values=True):
        if (reason := NOT_IN_URL.get(name)) is not None:
            raise ValueError(f"must not have ?{name}: {reason}")
    return value


def _not_empty(hours: str) -> str:
    begin, _, end = hours.partition("-")
    if begin == end:
        raise ValueError("begins when it ends; leave it out to work at all hours")
    return hours


RedisUrl = Annotated[SecretStr, BeforeValidator(_usable_url)]
KeyPrefix = Annotated[str, Field(pattern=PREFIX_PATTERN)]
HostAndPort = Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")]
SigningSecret = Annotated[SecretStr, Field(min_length=32, max_length=1024)]
"""At least 32 characters: `openssl rand -hex 32` gives 64."""
HoursOfDay = Annotated[
    str,
    Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$"),
    AfterValidator(_not_empty),
]
KeptSeconds = Annotated[int, Field(ge=1, le=limits.SECONDS)]
NonNegativeSeconds = Annotated[float, Field(ge=0, le=24 * 3600)]
PositiveSeconds = Annotated[float, Field(gt=0, le=24 * 3600)]
CommaList = BeforeValidator(_split)
JsonObject = BeforeValidator(_object)


class Table(BaseModel):
    """One table: no other keys, never changed, and no value in an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


TLS_SCHEME: Final = "rediss://"


class RedisSettings(Table):
    """The Redis that holds the jobs. Workers and producers must agree on it."""

    url: RedisUrl = Field(
        default=SecretStr(defaults.REDIS_URL),
        description="`redis://[user[:password]@]host:port/database`, `rediss://…` for TLS, or "
        "`unix://[user@]/path`",
    )
    by_model: Annotated[dict[ModelName, RedisUrl], JsonObject] = Field(
        default={}, description="alias → URL, for models that have a Redis of their own"
    )
    password: SecretStr | None = Field(
        default=None, description="password of the URL's user; one in the URL wins"
    )
    tls_ca: FilePath | None = Field(
        default=None,
        description="file of the authority that signed the server's certificate; none: the "
        "system's authorities",
    )
    tls_cert: FilePath | None = Field(
        default=None, description="file of our certificate, if the server asks for one"
    )
    tls_key: FilePath | None = Field(default=None, description="file of our certificate's key")
    timeout_seconds: PositiveSeconds = Field(
        default=defaults.REDIS_TIMEOUT_SECONDS,
        description="how long to wait for a connection, and for each reply",
    )
    key_prefix: KeyPrefix = Field(
        default=defaults.KEY_PREFIX, description="prefix of all our keys; RQ's is `RQ_KEY_PREFIX`"
    )

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing, given = "tls_cert", "tls_key"
            if self.tls_key is None:
                missing, given = given, missing
            raise rules_error([FieldError(f"redis.{missing}", f"is needed with redis.{given}")])
        urls = [url.get_secret_value() for url in (self.url, *self.by_model.values())]
        for name, file in (("tls_ca", self.tls_ca), ("tls_cert", self.tls_cert)):
            if file is not None and not any(url.startswith(TLS_SCHEME) for url in urls):
                # Without TLS the passwords, prompts and answers would travel in the clear.
                reason = f"is for TLS, which only a URL that begins with {TLS_SCHEME} has"
                raise rules_error([FieldError(f"redis.{name}", reason)])
        return self


class SentinelSettings(Table):
    """Redis Sentinels, which name the primary. The host of `redis.url` is then not used."""

    hosts: Annotated[tuple[HostAndPort, ...], CommaList] = Field(
        default=(), description="`host:port` of each Sentinel; none: there are no Sentinels"
    )
    service: str = Field(
        default=defaults.SENTINEL_SERVICE,
        min_length=1,
        max_length=255,
        description="the Sentinels' name for the primary",
    )
    username: str | None = Field(default=None, description="ACL user of the Sentinels themselves")
    password: SecretStr | None = Field(default=None, description="password of that user")


class JobSettings(Table):
    """What a job may be. Workers and producers must agree on it."""

    max_bytes: int = Field(
        default=limits.PAYLOAD_BYTES,
        ge=1024,
        le=limits.PAYLOAD_BYTES,
        description="size of a job as JSON, at most",
    )
    signing_keys: Annotated[tuple[SigningSecret, ...], CommaList] = Field(
        default=(),
        description="the first key signs, all of them verify; with keys, workers run signed jobs "
        "only",
    )
    queued_ttl: KeptSeconds = Field(
        default=lifetimes.DEFAULT.queued,
        description="seconds after which a job that no worker took ends as expired (`unserved`)",
    )
    events_ttl: KeptSeconds = Field(
        default=lifetimes.DEFAULT.events,
        description="seconds that a job's events are kept after its end; its result stays for its "
        "own `result_ttl`",
    )
    failed_ttl: KeptSeconds = Field(
        default=lifetimes.DEFAULT.failed,
        description="seconds that a failed or dead job is kept after its end, for a requeue",
    )


class BatchSettings(Table):
    """The rows that a worker decodes at once."""

    max_rows: int = Field(
        default=defaults.MAX_BATCH_ROWS,
        ge=1,
        le=1024,
        description="choices that are decoded at once, without headroom",
    )
    lane_min_share: float = Field(
        default=defaults.LANE_MIN_SHARE,
        ge=0,
        lt=1,
        description="part of the rows that `default` and `bulk` each keep while they have jobs",
    )
    lane_headroom: float = Field(
        default=0.125,
        ge=0,
        le=1,
        description="rows beyond `max_rows`, as a part of it: for `interactive` jobs, and for what "
        "a lane lacks of its share",
    )
    prefill_chunk_tokens: int = Field(
        default=defaults.PREFILL_CHUNK_TOKENS,
        ge=1,
        le=65_536,
        description="prompt tokens between two decode steps, at most; fewer if the device takes "
        "longer than a second for them",
    )


class CacheSettings(Table):
    """The KV cache, and the prefixes that it keeps for later prompts."""

    kind: Literal["auto", "paged", "padded"] = Field(
        default="auto", description="`auto`: paged if a kernel passed its self-check here"
    )
    bits: Annotated[Literal[4, 8] | None, BeforeValidator(_number)] = Field(
        default=None,
        description="bits of a key or value in a padded cache; none: as the model has them",
    )
    budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="size of the keys and values of all rows; none: derived from the device",
    )
    prefix_bytes: int | None = Field(
        default=None,
        ge=0,
        description="part of the budget for prefixes that no row uses; none: half of it, 0: off",
    )
    prefix_affinity_ms: int = Field(
        default=150,
        ge=0,
        le=10_000,
        description="how long a job is left to the worker that has its prefix; 0: off",
    )

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        if self.bits is not None and self.kind == "paged":
            reason = "needs a padded cache: no kernel reads blocks of so few bits"
            raise rules_error([FieldError("cache.bits", reason)])
        return self


class EngineSettings(Table):
    """The engine child of a worker, and when it is replaced."""

    native: bool = Field(
        default=True,
        description="use the native code and kernels that pass their self-check",
    )
    stall_seconds: PositiveSeconds = Field(
        default=10.0,
        description="an engine without progress for so long is ended; at least 60 in the first "
        "step of a model",
    )
    recycle_after_tokens: int = Field(
        default=20_000_000,
        ge=0,
        le=10**15,
        description="tokens after which the child is replaced; 0: never for that",
    )
    recycle_after_hours: float = Field(
        default=24.0,
        ge=0,
        le=24 * 365,
        description="age at which the child is replaced; 0: never for that",
    )


class WorkerSettings(Table):
    """What a worker holds, and how it delivers."""

    lease_seconds: PositiveSeconds = Field(
        default=defaults.LEASE_SECONDS,
        description="how long a job stays with a worker that stopped renewing its lease",
    )
    drain_seconds: NonNegativeSeconds = Field(
        default=defaults.DRAIN_SECONDS,
        description="time for running jobs to end after SIGTERM; the others are handed over",
    )
    flush_interval_ms: float = Field(
        default=10.0, ge=0, le=1000, description="time between two writes of decoded tokens"
    )
    buffer_tokens: int = Field(
        default=defaults.BUFFER_TOKENS,
        ge=1,
        le=1 << 30,
        description="decoded tokens that wait for Redis, at most; then the engine pauses",
    )
    rq_results: bool = Field(
        default=False,
        description="keep each result a second time, as RQ's `job.return_value()`",
    )
    model_budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="weights in memory at once; none: no bound for one model, half of the "
        "device's memory for several",
    )
    model_wait_seconds: PositiveSeconds = Field(
        default=15.0,
        description="how long jobs wait for a model that no worker has loaded, while others have "
        "work",
    )
    pinned_models: Annotated[tuple[ModelName, ...], CommaList] = Field(
        default=(), description="aliases of models that stay in memory once they are loaded"
    )


class ConditionSettings(Table):
    """When a worker claims jobs."""

    hours: Annotated[tuple[HoursOfDay, ...], CommaList] = Field(
        default=(), description="local times in which it claims, as `22:00-07:00`; none: always"
    )
    user_idle_seconds: NonNegativeSeconds = Field(
        default=0.0,
        description="it claims once the user left the machine alone for so long; 0: off",
    )
    pause_when_hot: bool = Field(
        default=False, description="claim nothing under heavy thermal pressure"
    )
    pause_on_battery: bool = Field(default=False, description="claim nothing on battery")
    hand_over: bool = Field(
        default=False, description="in a pause, also hand over the jobs that it holds"
    )


class MetricsSettings(Table):
    """`/healthz` and `/metrics`, by HTTP from the worker's parent, without a login."""

    host: str = Field(
        default="127.0.0.1", min_length=1, max_length=255, description="address to listen on"
    )
    port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="port to listen on; none: off, 0: any free port, which is logged",
    )


class LogSettings(Table):
    """The log of a worker and of a bulk file's runner."""

    format: Literal["json", "console"] = Field(
        default="console", description="`json`: one object in each line"
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest level that is logged"
    )
