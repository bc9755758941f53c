"""Settings: one table for each subject; the only reader of the environment.

The setting `max_rows` of the table `batch` is `max_rows` under `[batch]` in a TOML file
(`MLX_SERVING_CONFIG`, else `mlx-serving.toml` in the working directory if there is one),
`MLX_SERVING_BATCH_MAX_ROWS` in the environment, and `batch__max_rows` as a keyword:

    settings = load_settings(batch__max_rows=8)
    settings.batch.max_rows

Keywords win over the environment, and the environment wins over the file. Each of them replaces a
setting as a whole, lists and tables of models included.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from mlx_serving.common import defaults
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.job.schema import ModelName
from mlx_serving.common.setting_tables import (
    PREFIX_PATTERN,
    BatchSettings,
    CacheSettings,
    ConditionSettings,
    EngineSettings,
    JobSettings,
    JsonObject,
    LogSettings,
    MetricsSettings,
    RedisSettings,
    SentinelSettings,
    Table,
    WorkerSettings,
)
from mlx_serving.common.validation import pydantic_errors

ENV_PREFIX: Final = "MLX_SERVING_"
CONFIG_FILE: Final = "mlx-serving.toml"
OTHER_VARIABLES: Final = frozenset(
    ENV_PREFIX + name
    for name in ("CONFIG", "NO_NATIVE_BUILD", "SANITIZE", "BUILD_TESTS", "BUILD_PYTHON")
)
"""Variables with our prefix that are no settings: where the file is, and what the build reads."""
RQ_VARIABLE: Final = "RQ_KEY_PREFIX"
TALLY: Final = "tally"
TALLY_PATH: Final = Path(__file__).parents[1] / "tally" / "model"
"""The tiny model that ships with the package; spelled here so that nothing else is imported."""


class Settings(Table):
    """All settings, each with a working default. `load_settings` reads them."""

    redis: RedisSettings = RedisSettings()
    sentinel: SentinelSettings = SentinelSettings()
    jobs: JobSettings = JobSettings()
    models: Annotated[dict[ModelName, str], JsonObject] = Field(
        default={},
        description="folder on this machine, or `organisation/name@commit` of a hub",
    )
    batch: BatchSettings = BatchSettings()
    cache: CacheSettings = CacheSettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    conditions: ConditionSettings = ConditionSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _add_tally(self) -> Self:
        self.models.setdefault(TALLY, str(TALLY_PATH))
        return self

    def replace(self, **changes: Any) -> Settings:
        """Return settings with changes, which are keywords as those of `load_settings`.

        Raises:
            InvalidSettings: with each wrong name.

        """
        same = {name: dict(value) for name, value in self}
        return _validated(_merged(same, _by_table(changes)))


TABLES: Final[Mapping[str, type[BaseModel]]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
"""The tables of settings by name; `models` is none of them: its keys are aliases."""


def load_settings(**changes: Any) -> Settings:
    """Read file, environment and keywords.

    Args:
        changes: settings by path (`batch__max_rows=8`), or tables (`batch={"max_rows": 8}`).

    Raises:
        InvalidSettings: with the path of each wrong setting (`batch.max_rows`).

    """
    rq_prefix()
    path = _config_file()
    file = {} if path is None else _from_file(path)
    over = _merged(_from_environment(), _by_table(changes))
    try:
        return _validated(_merged(file, over))
    except InvalidSettings as error:
        raise InvalidSettings(
            [
                (at, f"{reason} (in {path})" if _is_from_file(at, file, over) else reason)
                for at, reason in error.errors
            ]
        ) from None


def setting_paths() -> Iterator[tuple[str, ...]]:
    """Yield the path of each setting: `("redis", "url")`, `("models",)`."""
    for name in Settings.model_fields:
        if name in TABLES:
            yield from ((name, key) for key in TABLES[name].model_fields)
        else:
            yield (name,)


def variable(path: tuple[str, ...]) -> str:
    """Return the environment's name of a setting."""
    return ENV_PREFIX + "_".join(path).upper()


def unknown_variables() -> list[str]:
    """Variables that have our prefix but are not settings: misspelt, or of another release."""
    known = {variable(path) for path in setting_paths()} | OTHER_VARIABLES
    given = (name for name in os.environ if name.upper().startswith(ENV_PREFIX))
    return sorted(name for name in given if name.upper() not in known)


def rq_prefix() -> str:
    """Return the prefix of RQ's keys. RQ reads the same variable when it is imported.

    Raises:
        InvalidSettings: keys can't be spelled with it.

    """
    prefix = os.environ.get(RQ_VARIABLE, defaults.RQ_PREFIX)
    if not re.fullmatch(PREFIX_PATTERN, prefix):
        raise InvalidSettings([(RQ_VARIABLE, f"must match {PREFIX_PATTERN}")])
    return prefix


def _validated(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise InvalidSettings(pydantic_errors(error)) from None


def _merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tables key by key; the later source wins."""
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            old = merged.get(name)
            if name not in TABLES or old is None:
                merged[name] = value
            elif isinstance(old, Mapping) and isinstance(value, Mapping):
                merged[name] = {**old, **value}
            else:
                raise InvalidSettings([(name, "must be a table")])
    return merged


def _by_table(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `batch__max_rows` into a key of the table `batch`."""
    whole: dict[str, Any] = {}
    single: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        table, _, key = name.partition("__")
        if key:
            single.setdefault(table, {})[key] = value
        else:
            whole[table] = value
    return _merged(whole, single)


def _from_environment() -> dict[str, Any]:
    given = {name.upper(): value for name, value in os.environ.items()}
    found = {
        "__".join(path): given[variable(path)]
        for path in setting_paths()
        if variable(path) in given
    }
    return _by_table(found)


def _is_from_file(at: str, file: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether the file alone gave the value, or one of the values, that an error names."""
    table, _, key = at.partition(".")
    given, other = file.get(table), over.get(table)
    if table not in TABLES or not key or not isinstance(given, Mapping):
        return table in file and table not in over
    return _held(key, given) and not (isinstance(other, Mapping) and _held(key, other))


def _held(key: str, table: Mapping[str, Any]) -> bool:
    """Whether a table has the key, or the table of the names that the key begins with."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in table)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings([(str(path), f"is not TOML: {error}")]) from None


def _config_file() -> Path | None:
    """TOML file to read; one that is named has to exist."""
    named = os.environ.get(f"{ENV_PREFIX}CONFIG")
    if named is None:
        return Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None
    if not Path(named).is_file():
        raise InvalidSettings([(f"{ENV_PREFIX}CONFIG", f"there is no file {named!r}")])
    return Path(named)
