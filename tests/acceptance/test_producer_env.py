"""A web backend's environment: the base install, without mlx, submits and streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.protocol.keys import Keys
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.scripted_worker import ScriptedWorker, queued

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.redis.local import LocalRedis

WORDS = ["3 ", "4 ", "5"]

PRODUCER = """
import asyncio, importlib.util, json, sys
from mlx_serving import AsyncClient, Client

JOB = {"model": "tally", "prompt": "count from 3 to 5", "result_ttl": 60}

async def follow(job_id):
    async with AsyncClient() as client:
        return [text async for text in client.stream(job_id, text=True)]

with Client() as client:
    job = client.submit(JOB)
    live = list(job.text())
    replayed = asyncio.run(follow(job.id))
    text = job.result().raise_for_state().text

print(json.dumps({
    "live": live, "replayed": replayed, "text": text,
    "installed": [n for n in ("mlx", "mlx_lm", "transformers") if importlib.util.find_spec(n)],
    "worker": [n for n in sys.modules if n.startswith("mlx_serving.worker")],
    "home": importlib.util.find_spec("mlx_serving").origin,
}))
"""


@pytest.fixture(scope="module")
def producer_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the base install of this repository."""
    folder = tmp_path_factory.mktemp("producer")
    environment = os.environ | {"MLX_SERVING_NO_NATIVE_BUILD": "1"}
    # The wheel is built with the tools that the test run has; nothing else of them is used.
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    _pip(Path(sys.executable), [*build, str(ROOT)], environment)
    (wheel,) = folder.glob("mlx_serving-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    _pip(python, ["install", str(wheel)], environment)
    return python


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_base_install_submits_and_streams(
    producer_python: Path, local_redis: LocalRedis, redis_client: redis.Redis, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], "MLX_SERVING_REDIS_URL": local_redis.url}
    producer = subprocess.Popen(
        [producer_python, "-c", PRODUCER],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with producer:
        wait_until(lambda: queued(redis_client) or producer.poll() is not None, timeout=60)
        ScriptedWorker(redis_client, Keys()).serve(WORDS, pause_s=0.05)
        output, _ = producer.communicate(timeout=60)
    assert producer.returncode == 0
    said = json.loads(output)
    assert (said["live"], said["replayed"], said["text"]) == (WORDS, WORDS, "".join(WORDS))
    assert (said["installed"], said["worker"]) == ([], [])
    assert Path(said["home"]).is_relative_to(producer_python.parents[1])


def _pip(python: Path, arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
