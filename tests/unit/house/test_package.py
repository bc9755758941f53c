"""The package: what it exports, and that a producer pays for nothing else."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

import mlx_serving

EXPORTED = [
    "AsyncClient",
    "BatchNotFound",
    "ChoiceDelta",
    "ChoiceResult",
    "Client",
    "CorruptEvent",
    "CorruptJob",
    "EngineError",
    "ErrorInfo",
    "Event",
    "EventsGone",
    "FieldError",
    "ForeignFunction",
    "GenerationJob",
    "GenerationResult",
    "IdempotencyConflict",
    "InvalidBatch",
    "InvalidJob",
    "InvalidSettings",
    "JobCancelled",
    "JobDead",
    "JobExpired",
    "JobFailed",
    "JobNotEnded",
    "JobNotFound",
    "JobState",
    "JobTooLarge",
    "LeaseLost",
    "LocalRedis",
    "Message",
    "MissingDependency",
    "MlxServingError",
    "PayloadTooLarge",
    "QueueFailure",
    "QueueRefused",
    "QueueUnavailable",
    "ResultTimeout",
    "Settings",
    "StreamGap",
    "StreamReset",
    "TenantLimited",
    "TextPart",
    "Timings",
    "Tool",
    "ToolCall",
    "UnknownModel",
    "UnsuccessfulJob",
    "Usage",
    "__version__",
    "load_settings",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_exported_names_are_these() -> None:
    assert sorted(mlx_serving.__all__) == sorted(EXPORTED)
    assert sorted(dir(mlx_serving)) == sorted(EXPORTED)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(mlx_serving, name) is getattr(mlx_serving, name)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="Clyent"):
        mlx_serving.Clyent  # noqa: B018 -- looking it up is the test


def test_the_version_is_the_distributions() -> None:
    assert mlx_serving.__version__ == version("mlx-serving")


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = run("import sys, mlx_serving; print(*sys.modules)").split()
    assert not {"redis", "rq", "pydantic", "msgspec", "structlog"} & set(loaded)


def test_a_producer_imports_no_engine() -> None:
    loaded = run(
        "import sys; from mlx_serving import Client, AsyncClient; print(*sys.modules)"
    ).split()
    assert not {"mlx", "mlx_lm", "transformers", "numpy"} & set(loaded)
    assert not [name for name in loaded if name.startswith("mlx_serving.worker")]


@pytest.mark.slow
def test_importing_the_client_costs_little_more_than_its_libraries() -> None:
    """CPU seconds of fresh processes in turns; a loaded machine may spoil a round, not four."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ours, base = "from mlx_serving import Client", "import redis, rq, pydantic, structlog"
    ratios = []
    for _ in range(4):
        pairs = [(seconds(ours), seconds(base)) for _ in range(3)]
        ratios.append(min(a for a, _ in pairs) / min(b for _, b in pairs))
        if ratios[-1] <= 1.2:
            return
    pytest.fail(f"over 1.2 in every round: {ratios}")
