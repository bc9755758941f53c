"""Runs the demo: private Redis, one worker, eight streams; checks and measures them."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from mlx_serving.cli.console import EXIT_ERROR, note
from mlx_serving.cli.demo.jobs import DEMO_JOBS, MODEL
from mlx_serving.cli.demo.measure import Track, figures, percentile, shown
from mlx_serving.cli.demo.process import DemoWorker, orderly_signals
from mlx_serving.cli.demo.view import make_view
from mlx_serving.cli.worker import engine_spec
from mlx_serving.common.errors import EngineError
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.common.states import JobState
from mlx_serving.producer.async_client import AsyncClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.cli.demo.jobs import DemoJob
    from mlx_serving.cli.demo.view import LineView, TableView
    from mlx_serving.common.settings import Settings
    from mlx_serving.common.worker_record import WorkerRecord
    from mlx_serving.producer.handles import AsyncJobHandle


def run_demo(timeout_s: float, jobs: Sequence[DemoJob] = DEMO_JOBS) -> int:
    """Run the demo; return 0 if every answer is right, else 1.

    Raises:
        MissingDependency: no redis-server, or no engine.
        EngineError: the worker does not come up, or the jobs do not end in time.

    """
    server = LocalRedis()
    with orderly_signals(), ExitStack() as ending:
        ending.callback(server.stop)  # before the start, because a signal may come during it
        server.start()
        settings = private_settings(server)
        spec = engine_spec(settings, MODEL)
        typer.echo(f"redis-server {_version(server)} on {server.socket}; loading the model ...")
        worker = DemoWorker(settings, MODEL, spec, server.folder / "worker.log")
        ending.callback(worker.stop)
        worker.start()
        tracks, right = _watch(worker, settings, jobs, timeout_s)
    for line in summary(tracks, right):
        typer.echo(line)
    return 0 if all(right) else EXIT_ERROR


def _watch(
    worker: DemoWorker, settings: Settings, jobs: Sequence[DemoJob], timeout_s: float
) -> tuple[list[Track], list[bool]]:
    """Stream all jobs; if that fails, show what the worker logged."""
    try:
        typer.echo(describe(worker.wait_until_ready(timeout_s)))
        return asyncio.run(_stream_all(settings, jobs, timeout_s))
    except TimeoutError:
        note(worker.log())
        raise EngineError(f"the jobs did not end within {timeout_s:.0f} s") from None
    except EngineError:
        note(worker.log())
        raise


def private_settings(server: LocalRedis) -> Settings:
    """The user's settings, except for Redis: the demo uses its own."""
    return load_settings(
        redis__url=server.url, redis__by_model={}, redis__password=None, redis__tls_ca=None,
        redis__tls_cert=None, redis__tls_key=None, sentinel__hosts=(), models={},
        worker__drain_seconds=1.0,
    )  # fmt: skip


def describe(worker: WorkerRecord) -> str:
    """Say what computes: device, native or twin, and from which queues it takes jobs."""
    return (
        f"worker {worker.name}: model {worker.model} (revision {worker.revision}) on MLX device "
        f"{worker.device}; {worker.acceleration or 'nothing accelerated'}; "
        f"room for {worker.kv_tokens_capacity} KV tokens"
    )


async def _stream_all(
    settings: Settings, jobs: Sequence[DemoJob], timeout_s: float
) -> tuple[list[Track], list[bool]]:
    """Submit all jobs at once, and follow each to its end."""
    async with asyncio.timeout(timeout_s), AsyncClient(settings=settings, model=MODEL) as client:
        began_s = time.perf_counter()
        handles = await client.submit_many([job.fields() for job in jobs])
        tracks = [Track(began_s) for _ in jobs]
        with make_view(jobs, tracks) as view:
            streams = [
                _Stream(client, job, view, index, tracks[index]).follow(handle)
                for index, (handle, job) in enumerate(zip(handles, jobs, strict=True))
            ]
            return tracks, list(await asyncio.gather(*streams))


@dataclass(frozen=True, slots=True)
class _Stream:
    """One job, from its first turn to its last."""

    client: AsyncClient
    job: DemoJob
    view: TableView | LineView
    index: int
    track: Track

    async def follow(self, handle: AsyncJobHandle) -> bool:
        """Consume it, and the turn after a tool's reply; return True if the answer is right."""
        await self._consume(handle)
        following = self.job.next_turn(await handle.result())
        if following is not None:
            await self._consume(await self.client.submit(following))
        right = self.track.state == JobState.FINISHED and self.job.is_right(self.track.text)
        self.view.ended(self.index, right=right)
        return right

    async def _consume(self, handle: AsyncJobHandle) -> None:
        async for event in handle.stream():
            self.track.add(event, time.perf_counter())
            self.view.delivered(self.index, shown(event))


def summary(tracks: Sequence[Track], right: Sequence[bool]) -> list[str]:
    """The figures, as lines of text."""
    total = figures(tracks)

    def ms(samples: list[float]) -> str:
        p50, p99 = (percentile(samples, share) * 1000 for share in (0.5, 0.99))
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"

    return [
        f"{sum(right)} of {len(right)} answers right",
        f"{total.tokens} tokens in {total.seconds:.2f} s, {total.tokens_per_second:.0f} tokens/s",
        "measured at the consumer:",
        f"  time to first token    {ms(total.ttft_s)}",
        f"  inter-token latency    {ms(total.itl_s)}  (a delivery's gap over its tokens)",
        f"  between deliveries     {ms(total.gaps_s)}",
    ]


def _version(server: LocalRedis) -> str:
    with server.client() as client:
        return str(client.info("server")["redis_version"])
