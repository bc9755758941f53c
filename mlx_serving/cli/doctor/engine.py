"""Checks of the engine: versions, device, native pieces or twins, and a model's answer."""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlx_serving.cli.doctor.report import MAY_NOT_LOOK, Check, Level
from mlx_serving.cli.models import BYTES_A_MB, found_path, hub_problem, model_view
from mlx_serving.cli.options import INSTALL, missing_engine
from mlx_serving.cli.overview import read_overview
from mlx_serving.cli.worker import model_path
from mlx_serving.common.errors import MissingPermission, MlxServingError
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.queues import model_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.cli.overview import Overview
    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.engine import Engine


def other_models(settings: Settings, model: str) -> Iterator[Check]:
    """Check the files of every alias except the one that is loaded anyway."""
    for alias in sorted(settings.models.keys() - {model}):
        view = model_view(alias, found_path(settings.models[alias]))
        if view.problem is not None or view.weight_bytes is None:
            yield Check(f"model {alias}", Level.WARN, f"{view.problem}")
            continue
        detail = f"{view.weight_bytes / BYTES_A_MB:.1f} MB of weights"
        yield Check(f"model {alias}", Level.OK, f"complete, not loaded here; {detail}")


def fleet_checks(endpoint: Endpoint) -> Iterator[Check]:
    """Report models that live workers could not load, and jobs that no worker will take."""
    try:
        overview = read_overview(endpoint)
    except MissingPermission:
        yield Check("fleet", Level.SKIP, MAY_NOT_LOOK)
        return
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


PACKAGES: Final = ("mlx-serving", "mlx", "mlx-lm", "rq", "redis", "hiredis")


PROBE: Final = ("count from 3 to 12", "3 4 5 6 7 8 9 10 11 12")


PROBE_TOKENS: Final = 64


MAPS: Final = Path("/proc/self/maps")


def engine_checks(settings: Settings, model: str) -> Iterator[Check]:
    """Check versions, device, acceleration and one model."""
    yield check_versions()
    missing = missing_engine()
    if missing:
        detail = (
            f"{' and '.join(missing)} not installed: this machine can submit, not serve; {INSTALL}"
        )
        yield Check("engine", Level.WARN, detail)
        return
    yield check_device()
    yield from check_acceleration(settings)
    yield check_model(settings, model)


def check_versions() -> Check:
    """List the versions that a bug report needs."""
    found = [f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Check("versions", Level.OK, ", ".join(found))


def check_device() -> Check:
    """Name MLX's device; on a CPU say whether a fast BLAS is loaded."""
    from mlx_serving.worker.engine.memory.device import device_name

    device = device_name()
    if sys.platform == "linux" and device.startswith("cpu") and not openblas_loaded():
        detail = (
            f"{device}; MLX's own BLAS is some ten times slower than OpenBLAS: "
            "set LD_PRELOAD=libopenblas.so.0"
        )
        return Check("mlx device", Level.WARN, detail)
    return Check("mlx device", Level.OK, device)


def openblas_loaded() -> bool:
    """Whether OpenBLAS is mapped into this process."""
    return MAPS.exists() and "libopenblas" in MAPS.read_text(encoding="utf-8", errors="replace")


def check_acceleration(settings: Settings) -> Iterator[Check]:
    """Report for each piece whether it is native or a twin, and why."""
    from mlx_serving.worker.engine.acceleration import reports

    for report in reports(prefer_native=settings.engine.native):
        wanted = report.implementation == "native" or not settings.engine.native
        detail = f"{report.implementation}: {report.reason}"
        yield Check(f"native {report.piece}", Level.OK if wanted else Level.WARN, detail)


def check_model(settings: Settings, model: str) -> Check:
    """Load the model and let it answer; only Tally's answer can be checked."""
    from mlx_serving.worker.engine.loader import EngineOptions, load_engine

    name = f"model {model}"
    try:
        problem = hub_problem(model, found_path(settings.models.get(model, "")))
        if problem is not None:  # doctor downloads nothing
            return Check(name, Level.FAIL, problem)
        path = model_path(settings, model)
        began = time.perf_counter()
        options = EngineOptions(max_batch_rows=1, prefer_native=settings.engine.native)
        engine = load_engine(path, options, name=model)
        loaded = time.perf_counter()
        text, tokens = _answer(engine, model)
        done = time.perf_counter()
    except MlxServingError as error:
        return Check(name, Level.FAIL, str(error))
    except Exception as error:  # noqa: BLE001 -- any error of a model is a finding
        return Check(name, Level.FAIL, f"does not load or run: {type(error).__name__}: {error}")
    speed = f"loaded in {loaded - began:.1f} s, {tokens / (done - loaded):.0f} tokens/s alone"
    if model == "tally" and text.strip() != PROBE[1]:
        return Check(name, Level.FAIL, f"{PROBE[0]!r} was answered {text!r}; {speed}")
    if not tokens:
        return Check(name, Level.FAIL, "decoded nothing")
    verdict = "answers right" if model == "tally" else "answers"
    return Check(name, Level.OK, f"{verdict}; {speed}; revision {engine.model_info.revision}")


def _answer(engine: Engine, model: str) -> tuple[str, int]:
    """Decode the probe's answer, greedy; return its text and number of tokens."""
    from mlx_serving.worker.engine.interface import Request, SamplingParams
    from mlx_serving.worker.engine.text.prompts import PromptEncoder

    job = GenerationJob.build(model=model, messages=[{"role": "user", "content": PROBE[0]}])
    prompt = PromptEncoder(engine.tokenizer).encode(job)
    engine.add(Request("doctor", prompt, SamplingParams(), PROBE_TOKENS))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return "".join(o.text for o in outputs), sum(len(o.token_ids) for o in outputs)
