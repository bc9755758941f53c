"""What raises while rows join ends those alone: the rows that decode go on as if nothing was."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models import longcat_flash_ngram
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer
from mlx_serving.worker.engine.kv.paged.placement import BlockPlacement
from tests.support.engine_support import Collected, drive, other_model, prefixes_of, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=5)
EARLY = [Request(f"early{n}", tuple(range(n, n + 40)), SAMPLED, 24) for n in range(2)]
BAD = Request("bad", (7,) * 45, SAMPLED, 24)
LATE = Request("late", tuple(range(100, 145)), SAMPLED, 24)


class Fault:
    """Raises once the engine has taken some steps; `times`: how often, 0 for always."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.armed, self.raised = error, times or 10**9, False, 0

    def __call__(self) -> None:
        if self.armed and self.left:
            self.left -= 1
            self.raised += 1
            raise self.error


Break = Callable[[pytest.MonkeyPatch, Callable[[], None]], None]


def break_extend(layer: int) -> Break:
    """An `extend` of the padded cache's n-th layer, when earlier ones have the new rows."""

    def install(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
        real, calls = BatchKVCache.extend, [0]

        def extend(self: Any, other: Any) -> None:
            calls[0] += 1
            if calls[0] > layer:
                calls[0] = 0
                fault()
            real(self, other)

        patch.setattr(BatchKVCache, "extend", extend)

    return install


def break_call(owner: Any, name: str, *, after: bool = False) -> Break:
    def install(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if not after:
                fault()
            result = real(*arguments, **named)
            if after:
                fault()
            return result

        patch.setattr(owner, name, call)

    return install


PADDED = {
    "merge": break_call(padded, "as_batch"),
    "the first layer's extend": break_extend(0),
    "a later layer's extend": break_extend(1),
}
PAGED = {
    "room": break_call(PagedCache, "_make_room"),
    "growth": break_call(PagedCache, "_grow"),
    "placing": break_call(BlockPlacement, "place_prefilled", after=True),
    "store": break_call(PagedLayer, "store"),
    "a later layer's store": break_call(PagedLayer, "store", after=True),
    "publishing": break_call(BlockPlacement, "publish"),
}
MIXED = PAGED | {"placing": break_call(BlockPlacement, "place_prompts", after=True)}
MIXED = {name: MIXED[name] for name in ("room", "growth", "placing", "publishing")}


def ways(**kinds: dict[str, Break]) -> list[Any]:
    return [
        pytest.param(kind, install, id=f"{kind}: {name}")
        for kind, breaks in kinds.items()
        for name, install in breaks.items()
    ]


SEVERAL = {name: install for name, install in PADDED.items() if name != "merge"}


def engine_of(kind: str, *, prefix_cache_bytes: int = 0) -> Engine:
    engine = tiny_engine(
        eos=(), chunk=512, paged=kind != "padded", prefix_cache_bytes=prefix_cache_bytes
    )
    if kind == "paged":  # prompts have chunks, as on Metal
        limits = cast("Any", engine._scheduler._prompts)._limits
        object.__setattr__(limits, "mixed_reads", 0)
    return engine


def run(engine: Engine, late: Iterable[Request], fault: Fault) -> dict[str, Collected]:
    """Let rows decode, then let others join; the fault strikes from then on."""
    for request in EARLY:
        engine.add(request)
    collected = {request.id: Collected() for request in EARLY}
    for _ in range(4):
        for output in engine.step():
            collected[output.request_id].add(output)
    fault.armed = True
    later = drive(engine, late)
    for name, row in later.items():
        if name not in collected:
            collected[name] = row
            continue
        before = collected[name]
        collected[name] = Collected(
            before.token_ids + row.token_ids, before.text + row.text,
            row.finish_reason, row.error_code, before.outputs + row.outputs,
        )  # fmt: skip
    return collected


def expected_of(kind: str, late: Iterable[Request]) -> dict[str, Collected]:
    return run(engine_of(kind), late, Fault(ValueError(), 0))


def allocator_of(engine: Engine) -> Any:
    return cast("Any", engine._runner)._cache.allocator


@pytest.mark.parametrize(("kind", "install"), ways(padded=PADDED, paged=PAGED, mixed=MIXED))
def test_a_join_that_raises_ends_its_row_alone(
    kind: str, install: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(ValueError("like 'top secret'"), 0)
    engine = engine_of(kind)
    with monkeypatch.context() as patch:
        install(patch, fault)
        collected = run(engine, [BAD], fault)
    bad = collected.pop("bad")
    assert fault.raised
    assert (bad.finish_reason, bad.error_code, bad.token_ids) == ("error", "join_failed", [])
    assert collected == expected_of(kind, [])
    if kind != "padded":
        assert allocator_of(engine).used == 0


@pytest.mark.parametrize(("kind", "install"), ways(padded=SEVERAL, paged=PAGED))
def test_where_one_of_two_prompts_fails_the_other_is_tried_apart(
    kind: str, install: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault strikes the chunk of both, and then the first prompt by itself."""
    fault = Fault(ValueError(), 2)
    with monkeypatch.context() as patch:
        install(patch, fault)
        collected = run(engine_of(kind), [BAD, LATE], fault)
    assert collected.pop("bad").error_code == "join_failed"
    assert fault.raised == 2
    assert collected == expected_of(kind, [LATE])


@pytest.mark.parametrize("install", MIXED.values(), ids=MIXED)
def test_prompts_that_a_step_can_not_take_have_chunks(
    install: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(ValueError(), 1)
    with monkeypatch.context() as patch:
        install(patch, fault)
        collected = run(engine_of("mixed"), [BAD, LATE], fault)
    assert fault.raised == 1
    assert collected == expected_of("mixed", [BAD, LATE])


@pytest.mark.parametrize(("kind", "install"), ways(padded=SEVERAL, paged=PAGED, mixed=MIXED))
def test_rows_that_find_no_memory_when_they_join_begin_again(
    kind: str, install: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), 1)
    taken: list[str] = []
    engine = engine_of(kind)
    take = engine._recovery.take

    def watch(rows: Any) -> Any:
        taken.extend(row.request.id for row in rows)
        return take(rows)

    with monkeypatch.context() as patch:
        install(patch, fault)
        patch.setattr(engine._recovery, "take", watch)
        collected = run(engine, [BAD, LATE], fault)
    assert taken == ["bad", "late"]
    assert collected == expected_of(kind, [BAD, LATE])


@pytest.mark.parametrize("kind", ["paged", "mixed"])
@pytest.mark.parametrize("name", MIXED)
def test_a_join_that_fails_leaves_the_prefix_cache_as_it_was(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the prompt is known; what is new of it must not be found, for it is nowhere."""
    engine = engine_of(kind, prefix_cache_bytes=1 << 26)
    known = Request("known", (*range(64), 1), SAMPLED, 2)
    drive(engine, [known])
    prefixes, allocator = prefixes_of(engine), allocator_of(engine)
    before = (allocator.used, prefixes.idle, prefixes.held)
    fault = Fault(ValueError(), 0)
    fault.armed = True
    bad = Request("bad", (*range(64), *range(200, 250), 1), SAMPLED, 2)
    with monkeypatch.context() as patch:
        (PAGED if kind == "paged" else MIXED)[name](patch, fault)
        assert drive(engine, [bad])["bad"].error_code == "join_failed"
    assert (allocator.used, prefixes.idle, prefixes.held) == before
    prefixes.check()
    again = drive(engine, [bad])["bad"]
    assert again.token_ids == drive(engine_of(kind), [bad])["bad"].token_ids


def test_what_the_prefix_cache_took_before_an_error_is_taken_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("paged", prefix_cache_bytes=1 << 26)
    fault = Fault(ValueError(), 1)
    fault.armed = True
    bad = Request("bad", tuple(range(80)), SAMPLED, 2)
    with monkeypatch.context() as patch:
        break_call(type(prefixes_of(engine)), "insert", after=True)(patch, fault)
        assert drive(engine, [bad])["bad"].error_code == "join_failed"
    assert allocator_of(engine).used == 0
    prefixes_of(engine).check()


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_parked_row_that_can_not_go_on_ends_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(eos=(), rows=2, paged=kind == "paged")
    stays = Request("stays", (1, 2, 3), SAMPLED, 40)
    expected = drive(engine_of(kind), [stays])["stays"]
    engine.add(stays)
    engine.add(Request("parked", (4, 5, 6), SAMPLED, 40, lane="bulk"))
    collected = {name: Collected() for name in ("stays", "parked", "first")}

    def step() -> None:
        for output in engine.step():
            collected[output.request_id].add(output)

    for _ in range(3):
        step()
    engine.add(Request("first", (7, 8), SAMPLED, 4, lane="interactive"))
    assert engine.parked == 1
    cache = cast("Any", engine._runner)._cache
    monkeypatch.setattr(cache, "resume", lambda _: 1 / 0)
    while engine.has_work:
        step()
    assert collected["parked"].error_code == "join_failed"
    assert collected["stays"].token_ids == expected.token_ids
    if kind == "paged":
        assert allocator_of(engine).used == 0


def test_a_twin_is_spared_what_is_done_to_the_other_in_place() -> None:
    layers = [CacheList(KVCache(), KVCache()) for _ in range(2)]
    for layer in layers:
        for part in layer.caches:
            part.update_and_fetch(mx.ones((1, 2, 3, 4)), mx.ones((1, 2, 3, 4)))
    cache = padded.as_batch(layers)
    before = [(part.offset.tolist(), part.keys.shape) for layer in cache for part in layer.caches]
    twice = padded.extended(cache, padded.as_batch(layers))
    for layer in twice:
        for part in layer.caches:
            part.offset += 5
            part.keys[..., 0, :] = 9
            assert part.keys.shape[0] == 2
    parts = [part for layer in cache for part in layer.caches]
    assert [(part.offset.tolist(), part.keys.shape) for part in parts] == before
    assert all(part.keys[..., :3, :].max().item() == 1 for part in parts)


LONGCAT: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 96, "moe_topk": 2, "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4, "zero_expert_num": 1, "num_layers": 2, "vocab_size": 300,
    "max_position_embeddings": 4096, "num_attention_heads": 4, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "ngram_vocab_size_ratio": 2,
    "emb_neighbor_num": 4, "emb_split_num": 2,
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_prompt_ends_no_other_row_of_longcat_flash_ngram(length: int) -> None:
    """Its first layer keeps the last three tokens, or fewer: those can't join rows of three."""
    model = other_model(longcat_flash_ngram, LONGCAT)
    long = Request("long", tuple(range(20)), SAMPLED, 20)
    expected = drive(tiny_engine(model, eos=()), [long])["long"]
    short = Request("short", tuple(range(length)), SAMPLED, 4)
    collected = drive(tiny_engine(model, eos=()), [long, short], every=4)
    assert collected["long"] == expected
    assert collected["short"].error_code == (None if length == 1 else "join_failed")
