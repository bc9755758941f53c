"""`mlx-serving worker`: run one worker until it is drained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_serving.cli.console import fail, note
from mlx_serving.cli.models import known_path
from mlx_serving.cli.options import RedisUrlOption, read_settings, require_engine
from mlx_serving.common.errors import MlxServingError, QueueRefused, UnknownModel

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
    redis_url: RedisUrlOption = None,
) -> None:
    """Serve one or more models, each from its three queues, until SIGTERM or Ctrl-C.

    Several are in memory at once as far as worker.model_budget_bytes allows; the others are loaded
    and unloaded as there is work for them.

    The first signal drains: the worker claims nothing more, lets jobs end within the grace time,
    and hands the rest over. The second signal hands over at once.

    Exit status: 0 when drained; 78 if settings, models, the installation or Redis are wrong, so
    that another start would not help; else 1.
    """
    from mlx_serving.common.telemetry import configure_logging, get_logger
    from mlx_serving.worker.process.crash import EXIT_CONFIGURATION
    from mlx_serving.worker.process.supervisor import default_name, run_worker

    first, *others = models = list(dict.fromkeys(model or ["tally"]))
    try:
        settings = read_settings(redis_url)
        spec = engine_spec(settings, first, engine, tokens_per_second, others=others)
        require_redis(settings, first, name)
    except MlxServingError as error:
        if error.retryable or type(error) is QueueRefused:  # a refusal that has no name may pass
            raise
        fail(error)
        raise typer.Exit(EXIT_CONFIGURATION) from None
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
    """Say what to load, and check it before a process is started for it.

    At least one of the models has to be complete: the worker serves those that it can load.

    Raises:
        UnknownModel: the settings have no such alias, or no model's files can be loaded;
            ModelUnreachable if a hub may answer at another start.
        InvalidSettings: the models do not share one Redis.
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
    """Folder of each model; at least one is complete."""
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
    """Check that the model's Redis answers, and may hold its queue, before the model is loaded.

    Warn of what Redis does not tell, and if a worker of this name runs, or did until just now:
    Redis can't tell two workers of one name apart, and they give each other's jobs back.

    Raises:
        QueueUnavailable: it can't be reached now.
        QueueRefused: it refuses our credentials or scripts, is a Cluster, or deletes keys.

    """
    from mlx_serving.common.redis.connection import connect, resolve
    from mlx_serving.common.redis.retrying import answered
    from mlx_serving.common.redis.server import check_scripts, check_server, read_server

    endpoint = resolve(settings, model)
    with connect(endpoint) as client:
        answered(client.ping)
        check_server(server := read_server(client))
        for what in server.unknown:
            note(f"warning: this user may not read {what} of Redis; a Redis that evicts loses jobs")
        check_scripts(client, endpoint.keys)
        if name and answered(lambda: client.exists(endpoint.keys.worker(name))):
            note(f"warning: a worker {name!r} was here 30 s ago or less; no two may share a name")


def model_path(settings: Settings, model: str) -> str:
    """Folder of a model that is complete and safe to load.

    Raises:
        UnknownModel: names what is wrong; ModelUnreachable if its hub does not answer.

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
