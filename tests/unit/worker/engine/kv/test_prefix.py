"""The engine with a prefix cache, on the paged cache's reference: same tokens, less computed."""

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import pytest
from msgspec.structs import replace

from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS
from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk
from tests.support.engine_support import GREEDY, drive, prefixes_of, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=77)
SHARED = tuple(n % 251 for n in range(4 * BLOCK_TOKENS))


class Counted:
    """An engine with a prefix cache, and how many prompt tokens it computed, padding included."""

    def __init__(self, *, mixed: bool = True, **options: Any) -> None:
        self.engine = tiny_engine(eos=(), paged=True, prefix_cache_bytes=None, **options)
        if not mixed:  # every prompt has a pass of its own
            prompts = cast("Any", self.engine)._scheduler._prompts
            prompts._limits = dataclasses.replace(prompts._limits, mixed_reads=0)
        self.prompt_tokens = 0
        runner = cast("Any", self.engine._runner)
        self._prefill, runner.prefill = runner.prefill, self._count
        self._join, runner.join = runner.join, self._count_mixed

    def _count(self, chunk: PrefillChunk) -> None:
        self.prompt_tokens += chunk.length * len(chunk.groups)
        self._prefill(chunk)

    def _count_mixed(self, chunk: PrefillChunk) -> None:
        if chunk.mixed:
            self.prompt_tokens += sum(row.uncached_tokens for row in chunk.rows)
        self._join(chunk)

    def computed(self, *requests: Request, every: int = 0) -> int:
        self.prompt_tokens = 0
        self.collected = drive(self.engine, requests, every=every)
        return self.prompt_tokens


@pytest.fixture
def counted() -> Iterator[Counted]:
    """An engine that must be whole in the end, with no block held by anybody."""
    made = Counted()
    yield made
    prefixes = prefixes_of(made.engine)
    prefixes.check()
    assert prefixes.held == 0
    prefixes.clear()
    assert prefixes.used == 0


def request(name: str, tail: tuple[int, ...] = (), salt: str = "", **fields: Any) -> Request:
    plain = Request(name, SHARED + tail, GREEDY, max_tokens=6, salt=salt)
    return replace(plain, **fields)


def expected(*requests: Request) -> Any:
    return drive(tiny_engine(eos=()), requests)


def test_a_second_job_computes_only_what_is_new(counted: Counted) -> None:
    first, second = request("a", (1, 2, 3)), request("b", (4, 5, 6, 7))
    assert counted.computed(first) == len(SHARED) + 2
    assert counted.collected["a"].cached_tokens == 0
    assert counted.computed(second) == 3
    assert counted.collected["b"].cached_tokens == len(SHARED)
    assert counted.collected == expected(second)


def test_the_last_token_is_always_computed(counted: Counted) -> None:
    whole = request("a")  # fills its blocks exactly
    counted.computed(whole)
    assert counted.computed(whole) == 0
    assert counted.collected["a"].cached_tokens == len(SHARED) - 1
    assert counted.collected == expected(whole)
    longer = request("b", (1,))
    counted.computed(longer)
    assert counted.computed(longer) == 0
    assert counted.collected["b"].cached_tokens == len(SHARED)
    assert counted.collected == expected(longer)


@pytest.mark.parametrize("beyond", [1, 9, 31])
def test_a_prefix_that_ends_within_a_block_is_shared_to_its_end(beyond: int) -> None:
    counted = Counted(chunk=512)
    prefix = SHARED + (77,) * beyond
    tails = [(n, *(n + i for i in range(39))) for n in range(12)]
    requests = [Request(str(n), prefix + tail, SAMPLED, 8) for n, tail in enumerate(tails)]
    assert counted.computed(*requests) == len(prefix) + 12 * 39
    assert counted.collected == expected(*requests)
    assert [row.cached_tokens for row in counted.collected.values()] == [0] + 11 * [len(prefix)]


@pytest.mark.parametrize(("common", "cached"), [(BLOCK_TOKENS - 1, 0), (BLOCK_TOKENS, 32)])
def test_what_is_less_than_a_block_is_computed_anew(
    counted: Counted, common: int, cached: int
) -> None:
    """As of every prompt's template: to gather so little takes longer than to compute it."""
    first, second = (Request(name, (*SHARED[:common], ord(name), 7), GREEDY, 6) for name in "ab")
    counted.computed(first)
    assert counted.computed(second) == common + 1 - cached
    assert counted.collected["b"].cached_tokens == cached
    assert counted.collected == expected(second)


def test_rows_that_arrive_together_compute_their_prefix_once(counted: Counted) -> None:
    requests = [request(str(n), (n, 7, n, 9)) for n in range(12)]
    assert counted.computed(*requests) == len(SHARED) + 12 * 3
    assert counted.collected == expected(*requests)
    assert [counted.collected[r.id].cached_tokens for r in requests] == [0] + 11 * [len(SHARED)]


def test_short_prompts_that_would_share_a_chunk_share_their_prefix() -> None:
    """Several fit one chunk; the first of them is waited for."""
    prompt = SHARED[:BLOCK_TOKENS]
    requests = [Request(str(n), (*prompt, n, 5), GREEDY, 6) for n in range(8)]
    others = [Request(f"o{n}", (n, 5, 6), GREEDY, 6) for n in range(4)]
    counted = Counted(chunk=512)
    assert counted.computed(*requests) == BLOCK_TOKENS + 1 + 7
    assert counted.collected == expected(*requests)
    counted.computed(*requests, *others)
    assert counted.collected == expected(*requests, *others)


def test_prompts_of_which_unequal_parts_are_known_share_a_chunk(counted: Counted) -> None:
    engine = counted.engine
    drive(engine, [request("a", (1, 2))])
    some = [
        Request("none", (9, 8, 7), SAMPLED, 8),
        Request("half", (*SHARED[: 2 * BLOCK_TOKENS], 3, 4, 5, 6, 7), SAMPLED, 8),
        request("all", (5,), sampling=SAMPLED),
        request("more", (5, 6, 7, 8), sampling=SAMPLED),
    ]
    assert drive(engine, some) == expected(*some)


@pytest.mark.parametrize("known", ["leader", "rider", "neither"])
def test_prompts_that_ride_along_get_the_same_whatever_is_known_of_them(known: str) -> None:
    counted = Counted(chunk=512, mixed=False)
    beginning = SHARED[:BLOCK_TOKENS]
    counted.computed(Request("before", (*beginning, 9), GREEDY, 2))
    others = {name: tuple(200 + i for i in range(BLOCK_TOKENS)) for name in ("leader", "rider")}
    begins = others | {known: beginning}
    leader = Request("leader", (*begins["leader"], 5, 6, 7), GREEDY, 6, lane="interactive")
    rider = Request("rider", (*begins["rider"], 8, 9, 3), SAMPLED, 6, lane="bulk")
    chunks: list[set[str]] = []
    counted.engine.on_prefill = lambda names: chunks.append(set(names))
    counted.computed(rider, leader)
    assert ({"leader", "rider"} in chunks) == (known == "rider")
    assert counted.collected == expected(rider, leader)


def test_no_prompt_rides_along_where_there_is_nothing_to_compute() -> None:
    counted = Counted(chunk=512, mixed=False)
    leader = Request("leader", (7,), GREEDY, 6, lane="interactive")
    rider = Request("rider", SHARED[:20], GREEDY, 6, lane="bulk")
    chunks: list[set[str]] = []
    counted.engine.on_prefill = lambda names: chunks.append(set(names))
    counted.computed(rider, leader)
    assert chunks[0] == {"leader"}
    assert counted.collected == expected(rider, leader)


def test_a_tenant_never_uses_what_another_computed(counted: Counted) -> None:
    first, second = request("a", (1, 2), salt="one"), request("b", (1, 2), salt="two")
    whole = len(SHARED) + 1
    assert counted.computed(first) == whole
    assert counted.computed(second) == whole
    assert counted.computed(request("c", (1, 2))) == whole
    assert counted.computed(first) == 1
    assert counted.computed(second) == 1
    assert counted.collected["b"].cached_tokens == len(SHARED)


def test_tenants_that_arrive_together_do_not_share(counted: Counted) -> None:
    requests = [request(f"{n}{salt}", (n, 2), salt=salt) for n in range(3) for salt in "xy"]
    assert counted.computed(*requests) == 2 * (len(SHARED) + 3)
    assert counted.collected == expected(*requests)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(counted: Counted) -> None:
    first = request("a", (1, 2), max_tokens=70)
    counted.computed(first)
    answer = counted.collected["a"].token_ids
    turn = Request("b", (*first.prompt, *answer, 5, 6, 7), GREEDY, 8)
    known = (len(first.prompt) + 69) // BLOCK_TOKENS * BLOCK_TOKENS  # of the answer, whole blocks
    assert counted.computed(turn) == len(turn.prompt) - 1 - known
    assert counted.collected["b"].cached_tokens == known
    assert counted.collected == expected(turn)


def test_a_resumed_job_finds_prompt_and_committed_tokens(counted: Counted) -> None:
    whole = request("a", (1, 2), sampling=SAMPLED, max_tokens=80)
    counted.computed(whole)
    tokens = counted.collected["a"].token_ids
    committed = RequestChoice(0, tuple(tokens[:50]))
    resumed = request("a", (1, 2), sampling=SAMPLED, max_tokens=80, choices=(committed,))
    assert counted.computed(resumed) == 0, "the last block of the answer has these tokens too"
    assert counted.collected["a"].token_ids == tokens[50:]
    # Usage counts the prompt's tokens, not the committed ones.
    assert counted.collected["a"].cached_tokens == len(whole.prompt)


def test_choices_share_what_is_known_of_their_prompt(counted: Counted) -> None:
    counted.computed(request("first", (1, 2, 3)))
    asked = request("n", (1, 2, 4), sampling=SAMPLED, choices=tuple(map(RequestChoice, range(4))))
    counted.prompt_tokens = 0
    counted.engine.add(asked)
    tokens: list[list[int]] = [[] for _ in asked.choices]
    while counted.engine.has_work:
        for output in counted.engine.step():
            tokens[output.choice] += output.token_ids
            assert output.cached_tokens == len(SHARED)
    assert counted.prompt_tokens == 2
    each = [replace(asked, choices=(choice,)) for choice in asked.choices]
    alone = [expected(choice)["n"].token_ids for choice in each]
    assert tokens == alone


def test_a_long_prompt_goes_on_after_what_is_known_of_it_chunk_by_chunk(counted: Counted) -> None:
    counted.computed(request("a"))
    tail = tuple(n % 250 for n in range(3, 153))  # three chunks
    longer = request("b", tail)
    found = counted.computed(longer), counted.collected["b"].cached_tokens
    assert found == (len(longer.prompt) - 1 - len(SHARED), len(SHARED))
    assert counted.collected == expected(longer)


def test_without_blocks_there_is_no_prefix_cache_and_the_engine_says_so() -> None:
    padded = tiny_engine(prefix_cache_bytes=None)
    assert "prefix cache: off (the KV cache keeps no blocks" in str(padded.acceleration[-1])
    off = tiny_engine(paged=True, prefix_cache_bytes=0)
    assert str(off.acceleration[-1]) == "prefix cache: off (switched off by the settings)"
    on = tiny_engine(paged=True, prefix_cache_bytes=None)
    assert str(on.acceleration[-1]).startswith("prefix index: ")
    requests = [request("a", (1,)), request("b", (1,))]
    for engine in (padded, off):
        assert drive(engine, requests)["b"].cached_tokens == 0


@pytest.mark.parametrize("steps", range(8))
def test_abort_in_every_phase_leaves_the_index_whole(counted: Counted, steps: int) -> None:
    engine = counted.engine
    drive(engine, [request("before", (1, 2))])
    good = [request(f"good{n}", (n + 1, 5, 9), max_tokens=12) for n in range(3)]
    victim = request("victim", tuple(n % 249 for n in range(150)), max_tokens=40)

    def abort(step: int) -> None:
        if step == steps:
            engine.abort("victim")

    collected = drive(engine, [good[0], victim, *good[1:]], on_step=abort)
    for row in good:
        assert collected[row.id] == expected(row)[row.id]
