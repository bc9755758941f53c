"""`mlx-serving worker`: run one worker until it is drained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_serving.cli.console import fail, note
from mlx_serving.cli.models import known_path
from mlx_serving.cli.options import RedisUrl, read_settings, require_engine
from mlx_serving.common.errors import InvalidSettings, MissingDependency, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.models.loading import EngineSpec


def worker(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", show_default="tally", help="Alias of a model; repeat it for several."
        ),
    ] = None,
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
    """Serve one or more models, each from its three queues, until SIGTERM or Ctrl-C.

    Several are in memory together as far as worker.model_budget_bytes allows; the others come and
    go as there is work for them.

    The first signal drains: no new claims, what ends within the grace time ends, the rest is
    handed over. The second hands over at once.

    Exit status: 0 when drained, 78 where settings, models or the install are wrong, so that another
    start mends nothing, else 1.
    """
    from mlx_serving.common.telemetry import configure_logging, get_logger
    from mlx_serving.worker.process.crash import EXIT_CONFIGURATION
    from mlx_serving.worker.process.supervisor import default_name, run_worker

    first, *others = models = list(dict.fromkeys(model or ["tally"]))
    try:
        settings = read_settings(redis_url)
        spec = engine_spec(settings, first, engine, tokens_per_second, others=others)
    except (InvalidSettings, UnknownModel, MissingDependency) as error:
        if error.retryable:
            raise
        fail(error)
        raise typer.Exit(EXIT_CONFIGURATION) from None
    require_redis(settings, first, name)
    configure_logging(log_format=settings.log.format, level=settings.log.level)
    name = name or default_name()
    get_logger(__name__).info("starting", worker=name, model=",".join(models), engine=engine)
    raise typer.Exit(run_worker(settings, first, spec, name))


def engine_spec(
    settings: Settings,
    model: str,
    kind: Literal["mlx", "simulated"] = "mlx",
    tokens_per_second: float = 0.0,
    others: Sequence[str] = (),
) -> EngineSpec:
    """Say what to load, checked before a process is started for it.

    Of several models one at least has to be complete: the worker serves what it can load.

    Raises:
        UnknownModel: the settings know no such alias, or the files of none can be loaded;
            ModelUnreachable where a hub's may come with another start.
        InvalidSettings: the models are not all on one Redis.
        MissingDependency: the engine is not installed.

    """
    from mlx_serving.common.redis.connection import resolve_shared
    from mlx_serving.worker.models.loading import EngineSpec

    resolve_shared(settings, (model, *others))
    if kind == "simulated":
        return EngineSpec("simulated", "", tokens_per_second, tuple((m, "") for m in others))
    require_engine()
    paths = _paths(settings, {alias: known_path(settings, alias) for alias in (model, *others)})
    return EngineSpec("mlx", paths.pop(model), others=tuple(paths.items()))


def _paths(settings: Settings, known: dict[str, str]) -> dict[str, str]:
    """Folder of each model, one of which is complete at least."""
    from mlx_serving.cli.models import found_path

    paths: dict[str, str] = {}
    problems: list[UnknownModel] = []
    for model, path in known.items():
        try:
            paths[model] = model_path(settings, model)
        except UnknownModel as error:
            problems.append(error)
            paths[model] = found_path(path)
            if len(known) > 1:
                typer.echo(f"warning: {error}; its jobs are left to other workers", err=True)
    if len(problems) == len(known):
        raise next((problem for problem in problems if problem.retryable), problems[0])
    return paths


def require_redis(settings: Settings, model: str, name: str | None = None) -> None:
    """Ask the model's Redis for an answer before a model is loaded for it.

    Warns where a worker of this name is there, or was until just now: two of one name are one to
    Redis, and give each other's jobs back.

    Raises:
        QueueUnavailable: it can't be reached, or refuses us.

    """
    from mlx_serving.common.redis.connection import connect, resolve
    from mlx_serving.common.redis.retrying import answered

    endpoint = resolve(settings, model)
    with connect(endpoint) as client:
        answered(client.ping)
        if name and answered(lambda: client.exists(endpoint.keys.worker(name))):
            note(f"warning: a worker {name!r} was here 30 s ago or less; no two may share a name")


def model_path(settings: Settings, model: str) -> str:
    """Folder of a model that is complete and safe to load.

    Raises:
        UnknownModel: names what is wrong; ModelUnreachable where its hub does not answer.

    """
    from pathlib import Path

    from mlx_serving.cli.models import fetched_path, refusal
    from mlx_serving.worker.engine.model_files import ModelFilesError, check_model_files

    path = known_path(settings, model)
    try:
        path = fetched_path(path)
        check_model_files(Path(path))
    except ModelFilesError as error:
        raise refusal(model, error) from None
    return path
