"""The other models of the settings, and what the live workers say of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.cli.doctor.report import Check, Level
from mlx_serving.cli.hub_models import found_path
from mlx_serving.cli.models import BYTES_A_MB, model_view
from mlx_serving.cli.overview import read_overview
from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.job.schema import model_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.cli.overview import Overview
    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.common.settings import Settings


def other_models(settings: Settings, model: str) -> Iterator[Check]:
    """Look at the files of every alias but the one that is loaded anyway."""
    for alias in sorted(settings.models.keys() - {model}):
        view = model_view(alias, found_path(settings, settings.models[alias]))
        if view.problem is not None or view.weight_bytes is None:
            yield Check(f"model {alias}", Level.WARN, f"{view.problem}")
            continue
        detail = f"{view.weight_bytes / BYTES_A_MB:.1f} MB of weights"
        yield Check(f"model {alias}", Level.OK, f"complete, not loaded here; {detail}")


def fleet_checks(endpoint: Endpoint) -> Iterator[Check]:
    """Say which models live workers could not load, and which jobs nobody will take."""
    try:
        overview = read_overview(endpoint)
    except MlxServingError as error:
        yield Check("fleet", Level.WARN, f"can't be read: {error}")
        return
    problems = list(fleet_problems(overview))
    for problem in problems:
        yield Check("fleet", Level.WARN, problem)
    if not problems:
        yield Check("fleet", Level.OK, f"{len(overview.workers)} live workers")


def fleet_problems(overview: Overview) -> Iterator[str]:
    """What is wrong with the models of a fleet."""
    for worker in overview.workers:
        for failure in worker.unloadable:
            yield f"worker {worker.name} can't load {failure}"
    served = {model for worker in overview.workers for model in worker.able}
    for queue in overview.queues:
        if queue.queued and model_of(queue.name) not in served:
            jobs = f"{queue.queued} jobs wait" if queue.queued > 1 else "a job waits"
            yield f"{jobs} in {queue.name}, and no live worker can load the model"
