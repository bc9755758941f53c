"""Many short requests come and go: when nothing runs, MLX holds what it held before."""

import gc
import random

import mlx.core as mx
import pytest

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from tests.support.engine_support import GREEDY, drive, tiny_engine

SLACK_BYTES = 4096  # an idle engine's few small arrays


def churn(engine: Engine, count: int, seed: int) -> None:
    chance = random.Random(seed)
    jobs = [
        Request(
            f"{seed}-{n}",
            tuple(chance.randrange(250) for _ in range(chance.choice((1, 4, 30, 90)))),
            chance.choice((GREEDY, SamplingParams(1.0, top_k=5, seed=n, logprobs=2))),
            chance.randint(1, 4),
        )
        for n in range(count)
    ]
    drive(engine, jobs, every=1)


def active() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


@pytest.mark.parametrize("paged", [False, True], ids=["padded", "paged, with prefixes"])
def test_nothing_stays_of_requests_that_ended(paged: bool) -> None:  # noqa: FBT001 - parametrized
    engine = tiny_engine(
        build_model(), rows=16, paged=paged, prefix_cache_bytes=1 << 18 if paged else 0
    )
    readings = []
    for seed in range(4):
        churn(engine, 60, seed)
        if engine.kv_memory is not None:
            engine.kv_memory.shrink()
            engine.kv_memory.restore()
        readings.append(active())
    assert max(readings[1:]) - readings[0] <= SLACK_BYTES, readings
