"""Prompts that arrive together and whose known part ends inside a block: they share what is new."""

import dataclasses
from functools import cache
from itertools import chain
from typing import Any, cast

import pytest

from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS
from tests.support.engine_support import drive, prefixes_of, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=9)
KNOWN = tuple(range(80))  # two blocks and a half
TWINS = [Request(f"twin{n}", (*KNOWN, *range(200, 221)), SAMPLED, 100) for n in range(24)]
OF_A_ROW = -(-TWINS[0].kv_tokens[0] // BLOCK_TOKENS)
MIXED = pytest.mark.parametrize("mixed", [False, True], ids=["chunk", "mixed"])


@cache
def block_bytes() -> int:
    token_bytes: int = cast("Any", tiny_engine(paged=True)._runner).cost.bytes_per_token
    return BLOCK_TOKENS * token_bytes


def engine_of(blocks: int, *, mixed: bool) -> Engine:
    """An engine that holds so many blocks, and knows the beginning of the twins."""
    budget = blocks * block_bytes()
    engine = tiny_engine(
        eos=(), chunk=512, paged=True, prefix_cache_bytes=budget, kv_budget_bytes=budget
    )
    if not mixed:
        prompts = cast("Any", engine)._scheduler._prompts
        prompts._limits = dataclasses.replace(prompts._limits, mixed_reads=0)
    drive(engine, [Request("known", (*KNOWN, 1, *range(150, 190)), SAMPLED, 2)])
    return engine


def rows_of(engine: Engine) -> list[list[int]]:
    return cast("list[list[int]]", cast("Any", engine._runner)._cache._rows)


@MIXED
@pytest.mark.parametrize("blocks", range(20, 60))
def test_rows_never_need_more_blocks_than_there_are(blocks: int, mixed: bool) -> None:  # noqa: FBT001 - parametrized
    engine = engine_of(blocks, mixed=mixed)
    waiting = list(TWINS)
    for _ in range(4):
        while waiting and engine.can_add(waiting[0]):
            engine.add(waiting.pop(0))
        engine.step()
        rows = rows_of(engine)
        held = set(chain.from_iterable(rows))
        later = sum(OF_A_ROW - len(row) for row in rows)
        assert len(held) + later <= blocks
        assert BLOCK_TOKENS * (len(held) + later) <= engine.kv_tokens_used
    assert len(rows) > 1
    assert len({row[2] for row in rows}) == 1, "one block for what all of them computed"
    prefixes_of(engine).check()


@MIXED
@pytest.mark.parametrize("blocks", [20, 35, 49, 59])
def test_all_rows_come_to_their_end(blocks: int, mixed: bool) -> None:  # noqa: FBT001 - parametrized
    collected = drive(engine_of(blocks, mixed=mixed), TWINS)
    tokens = {tuple(row.token_ids) for row in collected.values()}
    assert {row.error_code for row in collected.values()} == {None}
    assert [len(row) for row in tokens] == [100], "the same seed, the same tokens"
