"""Reading a job out of what Redis holds: any bytes give a job or one of our errors."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.common.errors import CorruptJob, MlxServingError, PayloadTooLarge
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.worker.claiming.intake import inflate, read_job

LIMIT = 10_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def packed(call: Any) -> bytes:
    return zlib.compress(json.dumps(call).encode())


def test_what_a_producer_sends_is_read_back() -> None:
    job = GenerationJob.build(model="tally", prompt="count", seed=3, stop="9")
    assert read_job(packed([JOB_FUNCTION, None, [job.to_wire()], {}]), limit=LIMIT) == job


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_as_one_of_ours(data: bytes) -> None:
    for raw in (data, zlib.compress(data)):
        with pytest.raises(MlxServingError):
            read_job(raw, limit=LIMIT)


@given(JSON)
def test_any_json_is_refused_as_one_of_ours(value: Any) -> None:
    calls: list[Any] = [value, [JOB_FUNCTION, None, [value], {}], [JOB_FUNCTION, None, value, {}]]
    for call in calls:
        with pytest.raises(MlxServingError):
            read_job(packed(call), limit=LIMIT)


@given(JSON, st.sampled_from(sorted(GenerationJob.model_fields)))
def test_any_value_of_a_field_is_accepted_or_refused_as_one_of_ours(value: Any, name: str) -> None:
    wire = {"v": 1, "model": "tally", "prompt": "x", name: value}
    try:
        job = read_job(packed([JOB_FUNCTION, None, [wire], {}]), limit=LIMIT)
    except MlxServingError:
        return
    assert isinstance(job, GenerationJob)


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
def test_up_to_the_limit_is_inflated(size: int) -> None:
    assert inflate(zlib.compress(bytes(size)), LIMIT) == bytes(size)


def test_a_byte_more_is_not() -> None:
    with pytest.raises(PayloadTooLarge, match="10000 bytes"):
        inflate(zlib.compress(bytes(LIMIT + 1)), LIMIT)


def test_a_bomb_costs_no_more_than_the_limit() -> None:
    bomb = zlib.compress(bytes(100_000_000), 9)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            inflate(bomb, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * LIMIT


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(b"[]")[:-3]])
def test_what_is_no_whole_zlib_stream_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptJob):
        read_job(data, limit=LIMIT)
