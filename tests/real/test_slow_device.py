"""A real model on a slow device (this machine's CPU), default settings: slow is not hung (D6)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from tests.support.figures import show
from tests.support.helpers import wait_until
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving.common.results import GenerationResult

EXPLANATIONS = sorted((ROOT / "docs" / "explanation").glob("*.md"))
LONG_TEXT = "".join(page.read_text() for page in EXPLANATIONS)[:15_000]
SHORT = (
    "What is the capital of France?", "Write a haiku about the sea.", "Name three primes.",
    "Translate 'good morning' to German.", "What is 12*12?", "Why is the sky blue?",
    "Explain recursion briefly.", "List four fruits.", "Who wrote Hamlet?",
    "Give a synonym of happy.", "What is HTTP?", "Define entropy.",
)  # fmt: skip


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


class DefaultWorker:
    """A worker that the command line starts, with nothing set but its Redis and its model."""

    def __init__(self, server: LocalRedis, model: Path, folder: Path) -> None:
        self._log = folder / "worker.log"
        ours = {name: v for name, v in os.environ.items() if not name.startswith("MLX_SERVING_")}
        environment = ours | {
            "MLX_SERVING_REDIS_URL": server.url,
            "MLX_SERVING_MODELS": f'{{"smol": "{model}"}}',
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("mlx-serving"), "worker", "--model", "smol"],
                cwd=folder, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self) -> str:
        return self._log.read_text()

    def serving(self) -> None:
        wait_until(lambda: "serving" in self.log(), timeout=120)

    def stop(self) -> None:
        """End it; what its jobs wrote is there."""
        self._process.terminate()
        assert self._process.wait(60) == 0


@contextmanager
def serving(
    server: LocalRedis, model: Path, folder: Path
) -> Iterator[tuple[Client, DefaultWorker]]:
    worker = DefaultWorker(server, model, folder)
    try:
        worker.serving()
        with Client(settings=load_settings(redis__url=server.url)) as client:
            yield client, worker
    finally:
        worker.stop()


def ask(client: Client, texts: tuple[str, ...], **fields: Any) -> list[GenerationResult]:
    """Submit all at once and wait for all; print what it took."""
    began = time.monotonic()
    jobs = [
        client.submit(
            model="smol", messages=[{"role": "user", "content": text}], temperature=0, **fields
        )
        for text in texts
    ]
    results = [client.result(job.id, timeout=600) for job in jobs]
    prompts = [result.usage.prompt_tokens for result in results if result.usage]
    show(f"{len(jobs)} jobs, {min(prompts)}-{max(prompts)} prompt tokens: "
         f"{time.monotonic() - began:.1f} s")  # fmt: skip
    return results


def check_undisturbed(results: list[GenerationResult], worker: DefaultWorker) -> None:
    assert {result.state.value for result in results} == {"finished"}, worker.log()[-3000:]
    assert {result.attempts for result in results} == {1}
    for event in ("child_died", "engine_stalled", "child_silent", "verdict"):
        assert event not in worker.log()


@pytest.mark.timeout(900)
def test_a_long_prompt_alone_ends_on_its_first_attempt(
    server: LocalRedis, smollm2: Callable[[str], Path], tmp_path: Path
) -> None:
    with serving(server, smollm2("float32"), tmp_path) as (client, worker):
        text = f"{LONG_TEXT}\nSummarise the text above in one sentence."
        results = ask(client, (text,), max_tokens=8)
        check_undisturbed(results, worker)
        assert results[0].usage is not None
        assert 3_000 < results[0].usage.prompt_tokens < 6_000


@pytest.mark.timeout(900)
def test_short_prompts_at_once_end_on_their_first_attempt(
    server: LocalRedis, smollm2: Callable[[str], Path], tmp_path: Path
) -> None:
    with serving(server, smollm2("bfloat16"), tmp_path) as (client, worker):
        results = ask(client, SHORT, max_tokens=8)
        check_undisturbed(results, worker)
        assert "Paris" in results[0].text
