"""`mlx-serving worker`: run one worker until it is drained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_serving.cli.extras import require_engine
from mlx_serving.cli.options import Model, RedisUrl, read_settings

if TYPE_CHECKING:
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.loading import EngineSpec


def worker(
    model: Model = "tally",
    name: Annotated[
        str | None, typer.Option(help="Name of this worker; no two may share one.")
    ] = None,
    engine: Annotated[
        Literal["mlx", "simulated"], typer.Option(help="simulated: tokens without a model.")
    ] = "mlx",
    tokens_per_second: Annotated[
        float, typer.Option(min=0, help="Of a simulated row; 0: no time at all.")
    ] = 0.0,
    redis_url: RedisUrl = None,
) -> None:
    """Serve one model from its three queues until SIGTERM or Ctrl-C.

    The first signal drains: no new claims, what ends within the grace time ends, the rest is
    handed over. The second hands over at once.
    """
    from mlx_serving.common.telemetry import configure_logging, get_logger
    from mlx_serving.worker.supervisor import default_name, run_worker

    settings = read_settings(redis_url)
    spec = engine_spec(settings, model, engine, tokens_per_second)
    require_redis(settings, model)
    configure_logging(log_format=settings.log_format, level=settings.log_level)
    name = name or default_name()
    get_logger(__name__).info("starting", worker=name, model=model, engine=engine)
    raise typer.Exit(run_worker(settings, model, spec, name))


def engine_spec(
    settings: Settings,
    model: str,
    kind: Literal["mlx", "simulated"] = "mlx",
    tokens_per_second: float = 0.0,
) -> EngineSpec:
    """Say what to load, checked before a process is started for it.

    Raises:
        UnknownModel: the settings know no such alias, or its files can't be loaded.
        MissingDependency: the engine is not installed.

    """
    from mlx_serving.worker.loading import EngineSpec

    if kind == "simulated":
        return EngineSpec("simulated", "", tokens_per_second)
    require_engine()
    return EngineSpec("mlx", model_path(settings, model))


def require_redis(settings: Settings, model: str) -> None:
    """Ask the model's Redis for an answer before a model is loaded for it.

    Raises:
        QueueUnavailable: it can't be reached, or refuses us.

    """
    import redis

    from mlx_serving.common.connection import connect, resolve
    from mlx_serving.common.retrying import retry_idempotent, unavailable

    with connect(resolve(settings, model)) as client:
        try:
            retry_idempotent(client.ping)
        except redis.RedisError as error:
            raise unavailable(error) from error


def model_path(settings: Settings, model: str) -> str:
    """Folder of a model that is complete and safe to load.

    Raises:
        UnknownModel: names what is wrong.

    """
    from pathlib import Path

    from mlx_serving.cli.hub_models import fetched_path
    from mlx_serving.common.errors import FieldError, UnknownModel
    from mlx_serving.worker.engine.model_files import ModelFilesError, check_model_files

    path = settings.models.get(model)
    if path is None:
        known = ", ".join(sorted(settings.models))
        reason = f"{model!r} is no alias of the settings (known: {known})"
        raise UnknownModel([FieldError("model", reason)])
    try:
        path = fetched_path(settings, path)
        check_model_files(Path(path))
    except ModelFilesError as error:
        raise UnknownModel([FieldError(f"models.{model}", str(error))]) from None
    return path
