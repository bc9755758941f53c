"""Commands run in a folder that somebody else filled: no process imports a file of that folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.protocol.keys import Keys
from tests.support.bulk_files import check_simulated, read_jsonl, simulated_line, write_lines
from tests.support.helpers import wait_until
from tests.support.schemas_for_tests import PERSON, schema
from tests.support.worker_process import WorkerProcess, quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import redis

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

COMMAND = Path(sys.executable).parent / "mlx-serving"
NAMES = sorted(
    name
    for name in {*sys.stdlib_module_names, *packages_distributions(), "usercustomize"}
    if name.isidentifier()
)
PLANTED = "import os, sys\nopen({marks!r} + __name__, 'w').write(repr(sys.orig_argv))\n"


class Folder:
    """A folder with a module of every name that a process of ours may import."""

    def __init__(self, path: Path) -> None:
        self.path, self._marks = path / "theirs", path / "marks"
        for folder in (self.path, self._marks):
            folder.mkdir()

    def plant(self, names: Iterable[str] = NAMES) -> None:
        """Put the modules there; each leaves a mark when it is imported."""
        for name in names:
            (self.path / f"{name}.py").write_text(PLANTED.format(marks=f"{self._marks}/"))

    def imported(self) -> dict[str, str]:
        """Names of the modules that were imported, and by which command."""
        return {mark.name: mark.read_text() for mark in self._marks.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.plant()
    return made


@pytest.fixture
def url(local_redis: LocalRedis, redis_client: redis.Redis) -> str:
    """An emptied Redis."""
    del redis_client
    return local_redis.url


def run(folder: Folder, url: str, *words: str) -> str:
    done = subprocess.run(
        [COMMAND, *words], cwd=folder.path, env=_environment(url), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment(url: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return given | {"MLX_SERVING_REDIS_URL": url}


@contextmanager
def worker(
    folder: Folder, server: LocalRedis, *options: str, start: tuple[str | Path, ...] = (COMMAND,)
) -> Iterator[None]:
    """A worker started in the folder; it serves, and must drain in the end."""
    log = folder.path / "worker.log"
    with log.open("w") as file, server.client() as client:
        process = subprocess.Popen(
            [*start, "worker", "--name", "w", *options],
            cwd=folder.path, env=_environment(server.url), stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            key = Keys().worker("w")
            wait_until(lambda: client.exists(key) or folder.imported(), timeout=60)
            assert folder.imported() == {}
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(url: str, **fields: Any) -> str:
    given = {"model": "tally", "max_tokens": 100, "temperature": 0.0, "result_ttl": 60}
    with Client(settings=quick_settings(url)) as client:
        return client.submit(given | fields).result(timeout=60).text


def test_a_worker_with_the_simulated_engine(
    folder: Folder, local_redis: LocalRedis, url: str
) -> None:
    with worker(folder, local_redis, "--engine", "simulated"):
        run(folder, url, "generate", "hello")
        assert "simulated" in run(folder, url, "status")
    assert folder.imported() == {}


def test_a_worker_that_tries_a_grammar(folder: Folder, local_redis: LocalRedis, url: str) -> None:
    with worker(folder, local_redis):
        prompt = [{"role": "user", "content": "json name=Ann age=34"}]
        answer = ask(url, messages=prompt, response_format=schema(PERSON))
    assert set(json.loads(answer)) == {"name", "age", "mood"}
    assert folder.imported() == {}


def test_a_worker_whose_parent_was_started_with_the_folder_on_its_path(
    tmp_path: Path, local_redis: LocalRedis, url: str
) -> None:
    """`python -m` puts it there. What only the child imports does not come from it."""
    folder = Folder(tmp_path)
    folder.plant(["mlx", "mlx_lm", "numpy", "transformers", "llguidance"])
    with worker(folder, local_redis, start=(sys.executable, "-m", "mlx_serving")):
        assert ask(url, prompt="1 2 3", response_format={"type": "regex", "regex": "[0-9]+"})
    assert folder.imported() == {}


def test_a_batch_whose_runner_outlives_its_command(
    folder: Folder, local_redis: LocalRedis, url: str
) -> None:
    write_lines(folder.path / "in.jsonl", map(simulated_line, range(1, 6)))
    with WorkerProcess(local_redis.url, "w", 1000.0) as process:
        process.serving()
        run(folder, url, "batch", "submit", "in.jsonl")
        run(folder, url, "batch", "watch")
        process.terminate()
        assert process.exit_status() == 0
    run(folder, url, "batch", "results", "-o", "out.jsonl")
    check_simulated(read_jsonl(folder.path / "out.jsonl"), range(1, 6))
    assert folder.imported() == {}


def test_a_batch_of_a_backend_that_is_there(
    folder: Folder, local_redis: LocalRedis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own imports are its own; the runner that it starts is ours."""
    path = write_lines(folder.path / "in.jsonl", map(simulated_line, range(1, 4)))
    monkeypatch.chdir(folder.path)
    monkeypatch.syspath_prepend(str(folder.path))
    with WorkerProcess(local_redis.url, "w", 1000.0) as process:
        process.serving()
        batches = Client(settings=quick_settings(url)).batches
        batch = batches.submit(path)
        wait_until(lambda: batches.status(batch.id).status == "completed", timeout=30)
        process.terminate()
        assert process.exit_status() == 0
    runners = {name: by for name, by in folder.imported().items() if "producer.batch" in by}
    assert runners == {}


def test_the_demo(folder: Folder, url: str) -> None:
    run(folder, url, "demo")
    assert folder.imported() == {}


@pytest.mark.parametrize(
    "words", [["doctor"], ["models"], ["status"], ["tenants", "list"], ["batch", "list"]]
)
def test_commands_that_start_nothing(folder: Folder, url: str, words: list[str]) -> None:
    subprocess.run(
        [COMMAND, *words], cwd=folder.path, env=_environment(url), capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert folder.imported() == {}


def test_a_planted_module_leaves_its_mark(folder: Folder) -> None:
    """The check itself: an interpreter that does import from the folder is seen."""
    subprocess.run([sys.executable, "-c", "import json"], cwd=folder.path, check=False)
    assert "json" in folder.imported()
