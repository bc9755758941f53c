"""Settings: the only reader of the environment.

Each field is `MLX_SERVING_<NAME>` in the environment, or `<name>` in a TOML file:
`MLX_SERVING_CONFIG`, else `mlx-serving.toml` in the working directory where there is one.
Keywords win over the environment, the environment over the file.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from mlx_serving.common import limits
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.job.schema import ModelName
from mlx_serving.common.validation import pydantic_errors

ENV_PREFIX: Final = "MLX_SERVING_"
CONFIG_FILE: Final = "mlx-serving.toml"
OTHER_VARIABLES: Final = frozenset(
    ENV_PREFIX + name
    for name in ("CONFIG", "NO_NATIVE_BUILD", "SANITIZE", "BUILD_TESTS", "BUILD_PYTHON")
)
"""Where the settings are, and what the build reads."""
TALLY: Final = "tally"
TALLY_PATH: Final = Path(__file__).parents[1] / "tally" / "model"
"""The tiny model that ships with the package; spelled here so that nothing else is imported."""


def _split(value: object) -> object:
    """Let the environment give a list as `a,b`."""
    return (
        tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value
    )


def _number(value: object) -> object:
    """Let the environment give a choice of numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _usable_url(value: object) -> object:
    """Refuse what redis-py would raise at later, or read as database 0; never quotes it."""
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
    return value


def _not_empty(hours: str) -> str:
    begin, _, end = hours.partition("-")
    if begin == end:
        raise ValueError("begins when it ends; leave it out to work at all hours")
    return hours


RedisUrl = Annotated[SecretStr, BeforeValidator(_usable_url)]
KeyPrefix = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:{}-]{1,64}$")]
HostAndPort = Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")]
SigningSecret = Annotated[SecretStr, Field(min_length=32, max_length=1024)]
"""At least 32 characters: `openssl rand -hex 32` gives 64."""
HoursOfDay = Annotated[
    str,
    Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$"),
    AfterValidator(_not_empty),
]
PositiveSeconds = Annotated[float, Field(gt=0, le=24 * 3600)]


class Settings(BaseSettings):
    """All settings, each with a working default; times in the unit of their name."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        validate_default=False,
        # `models` and `model_…` are ours to use.
        protected_namespaces=(),
    )

    # Redis; the URL may hold user and password, which then win over the fields below
    redis_url: RedisUrl = Field(
        default=SecretStr("redis://localhost:6379/0"),
        description="`redis://`, `rediss://` or `unix://`; a user and password in it win",
    )
    redis_by_model: dict[ModelName, RedisUrl] = Field(
        default={}, description="alias → URL, where models have a Redis of their own"
    )
    redis_username: str | None = Field(default=None, description="ACL user")
    redis_password: SecretStr | None = Field(default=None, description="its password")
    redis_tls: bool = Field(default=False, description="TLS, also where the URL says `redis://`")
    redis_tls_ca: FilePath | None = Field(
        default=None, description="who signed the server's certificate; none: the system's"
    )
    redis_tls_cert: FilePath | None = Field(
        default=None, description="our certificate, where the server asks for one"
    )
    redis_tls_key: FilePath | None = Field(default=None, description="its key")
    redis_connect_timeout_seconds: PositiveSeconds = Field(
        default=5.0, description="for a connection"
    )
    redis_read_timeout_seconds: PositiveSeconds = Field(default=5.0, description="for a reply")
    sentinel_hosts: Annotated[tuple[HostAndPort, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="`host:port` of each Sentinel; the URL's host is not used then"
    )
    sentinel_service: str = Field(
        default="mymaster", description="name of the primary with the Sentinels"
    )
    sentinel_username: str | None = Field(default=None, description="ACL user of the Sentinels")
    sentinel_password: SecretStr | None = Field(default=None, description="its password")
    key_prefix: KeyPrefix = Field(default="mlxs", description="of every key of ours")
    # RQ reads this variable itself, when it is imported: the two must agree.
    rq_prefix: KeyPrefix = Field(
        default="rq",
        validation_alias=AliasChoices("rq_prefix", "RQ_KEY_PREFIX"),
        description="of RQ's keys; RQ reads `RQ_KEY_PREFIX` itself, so set that",
    )

    # Signed jobs: the first key signs, all of them verify; with keys, workers run signed jobs only
    signing_keys: Annotated[tuple[SigningSecret, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="with keys, workers run only jobs that one of them signed"
    )

    # Models: alias → local path, or "organisation/name@revision" of the hub
    models: dict[ModelName, str] = Field(
        default={},
        description="alias → folder on this machine, or `organisation/name@commit` of a hub",
    )
    hub_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        description="the hub's URL; none: as huggingface_hub has it",
    )
    hub_cache: Path | None = Field(
        default=None,
        description="folder for what a hub gave; none: as huggingface_hub has it",
    )
    model_budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="of weights in memory at once; none: half of the device's, for several models",
    )
    pinned_models: Annotated[tuple[ModelName, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="aliases that never leave memory once they are loaded"
    )
    model_wait_seconds: PositiveSeconds = Field(
        default=15.0,
        description="how long jobs wait for a model that no worker has, while others have work",
    )
    model_load_seconds: PositiveSeconds = Field(
        default=300.0, description="the most that a slice of a model's load may take"
    )

    # Delivery
    lease_seconds: PositiveSeconds = Field(
        default=10.0, description="for which a job stays a silent worker's"
    )
    reap_interval_seconds: PositiveSeconds = Field(
        default=2.0, description="between two looks for leases that ran out"
    )
    engine_stall_seconds: PositiveSeconds = Field(
        default=10.0,
        description="after which an engine that makes no progress is ended; at least 60 in the "
        "first step of a model that was loaded",
    )
    drain_grace_seconds: float = Field(
        default=30.0,
        ge=0,
        le=24 * 3600,
        description="after SIGTERM, for what runs; the rest is handed over",
    )
    flush_interval_ms: float = Field(
        default=10.0, ge=0, le=1000, description="between two commits of what was decoded"
    )
    prefix_affinity_ms: int = Field(
        default=150,
        ge=0,
        le=10_000,
        description="how long a job is left to the worker that has its prefix; 0: not at all",
    )
    buffer_tokens: int = Field(default=65_536, ge=1, description="decoded but not yet in Redis")
    max_payload_bytes: int = Field(
        default=limits.PAYLOAD_BYTES,
        ge=1024,
        le=limits.PAYLOAD_BYTES,
        description="of a job, as JSON",
    )

    # Engine
    max_batch_rows: int = Field(
        default=64, ge=1, le=1024, description="choices that are decoded at once, without headroom"
    )
    lane_min_share: float = Field(
        default=0.1, ge=0, lt=1,
        description="of the batch's rows, what `default` and `bulk` each keep while they have jobs",
    )  # fmt: skip
    lane_headroom: float = Field(
        default=0.125, ge=0, le=1,
        description="rows beyond max_batch_rows, as a part of it: for `interactive` jobs, and for "
        "what a lane lacks of its share",
    )  # fmt: skip
    kv_budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="bytes for keys and values of all rows; none: decided from the device",
    )
    prefix_cache_bytes: int | None = Field(
        default=None, ge=0,
        description="of the KV budget, for prefixes that no row uses; none: half, 0: off",
    )  # fmt: skip
    kv_cache: Literal["auto", "paged", "padded"] = Field(
        default="auto", description="auto: paged where a kernel proved itself here"
    )
    kv_bits: Annotated[Literal[4, 8] | None, BeforeValidator(_number)] = Field(
        default=None, description="of a key or value in the padded KV cache; none: the model's own"
    )
    prefill_chunk_tokens: int = Field(
        default=512,
        ge=1,
        le=65_536,
        description="of prompts, between two decode steps: the most; fewer where the device takes "
        "longer than a second",
    )
    native: bool = Field(
        default=True,
        description="use the native pieces and kernels where they pass their self-check",
    )

    # Planned replacement of the engine child, see docs/explanation/memory.md; 0: never for that
    recycle_after_tokens: int = Field(default=20_000_000, ge=0, description="decoded by one child")
    recycle_after_steps: int = Field(default=400_000, ge=0, description="of the engine")
    recycle_after_hours: float = Field(
        default=24.0,
        ge=0,
        le=24 * 365,
        description="of one child",
    )

    # When this worker claims: local times as `22:00-07:00`; what the machine must not be
    work_hours: Annotated[tuple[HoursOfDay, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(),
        description="local times in which the worker claims, as `22:00-07:00`; none: always",
    )
    back_off_user_seconds: float = Field(
        default=0.0,
        ge=0,
        le=24 * 3600,
        description="claim nothing until the user left the machine alone for so long; 0: off",
    )
    back_off_hot: bool = Field(
        default=False, description="claim nothing under heavy thermal pressure"
    )
    back_off_battery: bool = Field(default=False, description="claim nothing on battery")
    back_off_hands_over: bool = Field(
        default=False, description="hand over what is held, beside claiming nothing"
    )

    # Health and metrics, by HTTP from the worker's parent: nobody is asked who he is
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="of `/healthz` and `/metrics`; none: off, 0: any free port, see the log",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="address of `/healthz` and `/metrics`",
    )

    # Logs
    log_format: Literal["json", "console"] = Field(
        default="console", description="`json`: one object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then the environment, then the TOML file."""
        del dotenv_settings, file_secret_settings
        file = TomlConfigSettingsSource(settings_cls, toml_file=_config_file())
        return init_settings, env_settings, file

    @model_validator(mode="after")
    def _add_tally(self) -> Self:
        self.models.setdefault(TALLY, str(TALLY_PATH))
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.lease_seconds <= self.reap_interval_seconds:
            raise ValueError("lease_seconds must be longer than reap_interval_seconds")
        if (self.redis_tls_cert is None) != (self.redis_tls_key is None):
            raise ValueError("redis_tls_cert and redis_tls_key go together")
        if self.kv_bits is not None and self.kv_cache == "paged":
            raise ValueError("kv_bits needs a padded kv_cache: nothing reads blocks in few bits")
        return self


def load_settings(**overrides: Any) -> Settings:
    """Read file, environment and keywords. Raises InvalidSettings with each wrong name."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise InvalidSettings(pydantic_errors(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings([(str(_config_file()), f"is not TOML: {error}")]) from None
    except SettingsError as error:
        # Its text names the field; the value, which may be a secret, is only in its cause.
        raise InvalidSettings(str(error)) from None


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings and are none: misspelt, or newer than us."""
    fields = Settings.model_fields.items()  # but the one that has RQ's name
    known = {ENV_PREFIX + name.upper() for name, field in fields if not field.validation_alias}
    known |= OTHER_VARIABLES
    given = (name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    return sorted(name for name in given if name.upper() not in known)


def _config_file() -> Path | None:
    """TOML file to read; one that is named has to exist."""
    named = os.environ.get(f"{ENV_PREFIX}CONFIG")
    if named is None:
        return Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None
    if not Path(named).is_file():
        raise InvalidSettings([(f"{ENV_PREFIX}CONFIG", f"there is no file {named!r}")])
    return Path(named)
