"""Loads a model folder into a warm engine."""

import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlx_serving.common import defaults
from mlx_serving.worker.engine.acceleration import choose_sampler, make_detokenizer
from mlx_serving.worker.engine.batch_runner import Attachments
from mlx_serving.worker.engine.context_length import context_length
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.fused_layers import fuse
from mlx_serving.worker.engine.in_thread import in_thread
from mlx_serving.worker.engine.interface import ModelInfo, Request, SamplingParams
from mlx_serving.worker.engine.kv.choice import CacheKind, choose_cache
from mlx_serving.worker.engine.kv.paged.step import MIXED_ROWS
from mlx_serving.worker.engine.kv.prefix.choice import make_prefix_cache
from mlx_serving.worker.engine.kv.quantized import KvBits
from mlx_serving.worker.engine.memory.guard import MemoryRoom
from mlx_serving.worker.engine.memory.kv_caches import KvMemory
from mlx_serving.worker.engine.model_files import check_model_files, model_revision, tokenizer_hash
from mlx_serving.worker.engine.model_runner import ModelRunner
from mlx_serving.worker.engine.scheduling.chunk import FIRST_TOKENS, STEP_SECONDS
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.text.marked_detokenizer import with_markers

CPU_KV_BUDGET_BYTES: Final = 1 << 30
# Of the memory beside the weights. The rest is for activations, logits, the copy of one layer's
# cache while rows join or leave, and the system.
KV_MEMORY_FRACTION: Final = 0.75
MODEL_MEMORY_FRACTION: Final = 0.5  # of the device's memory, for weights of several models
WARM_ROWS: Final = 320  # the largest step with prompts that is warmed up
WARM_PROMPT_TOKENS: Final = 128
SLICE_BYTES: Final = 1 << 28  # of weights to read at once, while rows of other models wait


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much of the device an engine takes. `kv_budget_bytes` None: derived from the device.

    `prefix_cache_bytes`: the part of the KV budget that idle prefixes may keep; None: half of it,
    0: no prefix is cached. `kv_cache`, `kv_bits`: see `kv.choice.choose_cache`. `step_seconds`: how
    long a step with a prefill chunk may take.
    """

    max_batch_rows: int = defaults.MAX_BATCH_ROWS
    kv_budget_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    kv_cache: CacheKind = "auto"
    kv_bits: KvBits | None = None
    prefill_chunk_tokens: int = defaults.PREFILL_CHUNK_TOKENS
    first_chunk_tokens: int = FIRST_TOKENS
    step_seconds: float = STEP_SECONDS
    lane_min_share: float = defaults.LANE_MIN_SHARE
    lane_headroom: float = 0.0
    prefer_native: bool = True
    warm_up: bool = True


def load_engine(
    model_path: str | Path,
    options: EngineOptions = EngineOptions(),
    *,
    name: str | None = None,
) -> Engine:
    """Check and load a model folder, and compute once, so that no request waits for that.

    `name` is the model's alias in jobs; None: the folder's name. Another thread than the one that
    loaded the engine may use it, but only one.

    Raises:
        ModelFilesError: the folder is incomplete or holds something that is never loaded.
        UnsupportedModelError: the model's caches can't be batched.
        UnsupportedVocabularyError: the tokenizer's text can't be streamed exactly.
        ValueError: mlx-lm doesn't know the architecture, or an option is out of range.
    """
    loading = load_in_slices(model_path, options, name=name)
    try:
        while True:
            next(loading)
    except StopIteration as loaded:
        engine: Engine = loaded.value
        return engine


def load_in_slices(
    model_path: str | Path,
    options: EngineOptions = EngineOptions(),
    *,
    name: str | None = None,
) -> Generator[None, None, Engine]:
    """Load as `load_engine` does, a slice at each `next`, so that other engines can step between.

    A slice is one of the load's parts, or some 256 MiB of weights, or one step of the warm-up; the
    tokenizer is read in a thread of its own. If closed before its end, it leaves nothing behind.
    """
    path = Path(model_path)
    check_model_files(path)
    model, config = load_model(path, lazy=True, trust_remote_code=False)
    yield
    yield from _read_weights(model)
    if options.prefer_native and mx.default_device() != mx.cpu:
        fuse(model)
    yield
    trusted, eos = {"trust_remote_code": False}, config.get("eos_token_id")
    tokenizer = yield from in_thread(lambda: load_tokenizer(path, trusted, eos_token_ids=eos))
    choice = choose_cache(
        model, prefer_native=options.prefer_native, kind=options.kv_cache, bits=options.kv_bits
    )
    yield
    runner = ModelRunner(model, choice)
    info = ModelInfo(
        name or path.resolve().name,
        model_revision(path),
        tokenizer_hash(path),
        runner.cost.vocab_size,
        frozenset(tokenizer.eos_token_ids),
        context_length(config),
    )
    engine = build_engine(runner, tokenizer, info, options)
    yield
    if options.warm_up:
        yield from _warm_up(engine)
    return engine


def _read_weights(model: Any) -> Iterator[None]:  # noqa: ANN401 - a model of mlx-lm
    """Read the weights of a model that was loaded lazily."""
    some: list[mx.array] = []
    size = 0
    named: Any = tree_flatten(model.parameters())
    for _, weights in named:
        some.append(weights)
        size += weights.nbytes
        if size >= SLICE_BYTES:
            mx.eval(some)
            some, size = [], 0
            yield
    mx.eval(some)


def build_engine(
    runner: ModelRunner,
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper forwards by getattr
    info: ModelInfo,
    options: EngineOptions = EngineOptions(),
) -> Engine:
    """Put an engine together from a model in memory."""
    cost, choice = runner.cost, runner.choice
    budget = default_kv_budget() if options.kv_budget_bytes is None else options.kv_budget_bytes
    limits = SchedulerLimits(
        BatchSize.of(options.max_batch_rows, options.lane_min_share, options.lane_headroom),
        kv_capacity_tokens=budget // cost.bytes_per_token,
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        first_chunk_tokens=options.first_chunk_tokens,
        step_seconds=options.step_seconds,
        kv_row_overhead_tokens=choice.row_overhead_tokens(cost),
        kv_block_tokens=choice.block_tokens,
        mixed_reads=choice.mixed_reads,
    )
    prefixes, prefix_report = make_prefix_cache(
        limits.kv_block_tokens,
        limits.kv_capacity_tokens,
        None if options.prefix_cache_bytes is None
        else options.prefix_cache_bytes // cost.bytes_per_token,
        prefer_native=options.prefer_native,
    )  # fmt: skip
    if prefixes is not None:
        runner.use_prefixes(prefixes)
    runner.limit_kv(limits.kv_capacity_tokens)
    native = options.prefer_native
    plain, report = make_detokenizer(tokenizer, prefer_native=native)
    detokenizer = with_markers(plain, tokenizer, prefer_native=native)
    make_draw, sampler_report = choose_sampler(
        prefer_native=native, logits_dtype=runner.logits_dtype
    )
    runner.use_sampler(make_draw)
    found = (report, sampler_report, choice.report, prefix_report)
    room = MemoryRoom(
        block_tokens=limits.kv_block_tokens, overhead_tokens=limits.kv_row_overhead_tokens
    )
    attachments = Attachments(
        tokenizer,
        tuple(each for each in found if each is not None),
        KvMemory(runner, room, cost.bytes_per_token, prefixes),
    )
    return Engine(runner, Scheduler(limits, prefixes), detokenizer, info, attachments)


def default_kv_budget() -> int:
    """Return the bytes for KV caches on this device; call it when the weights are loaded."""
    if mx.default_device() == mx.cpu:
        return CPU_KV_BUDGET_BYTES
    return max(0, int((_device_memory() - mx.get_active_memory()) * KV_MEMORY_FRACTION))


def default_budgets(all_weights: int, model_budget: int | None) -> tuple[int, int]:
    """Return the bytes for weights and for KV caches of several models, before any is loaded.

    Weights get `model_budget`, or half of the device's memory if it is None. `all_weights` is the
    size of all models together: KV caches get a part of the memory beside them.
    """
    memory = _device_memory()
    for_models = model_budget or int(memory * MODEL_MEMORY_FRACTION)
    if mx.default_device() == mx.cpu:
        return for_models, CPU_KV_BUDGET_BYTES
    return for_models, max(0, int((memory - min(all_weights, for_models)) * KV_MEMORY_FRACTION))


def _device_memory() -> int:
    """Return the bytes that MLX may use on this device; on a CPU, all of the machine's memory."""
    if mx.default_device() == mx.cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = mx.device_info()
    memory = device.get("max_recommended_working_set_size") or device.get("total_memory")
    return int(device["memory_size"] if memory is None else memory)


def warm_up(engine: Engine) -> None:
    """Run each path of a step once (kernels load or compile on first use): greedy, then mixed."""
    for _ in _warm_up(engine):
        pass


def _warm_up(engine: Engine) -> Iterator[None]:
    """Warm up; yield after each step."""
    token = min(1, engine.model_info.vocab_size - 1)
    mixed = SamplingParams(temperature=0.8, top_p=0.9, top_k=8, min_p=0.05, seed=1)
    plain = SamplingParams(temperature=0.8, seed=1)
    adjusted = SamplingParams(
        temperature=0.8, repetition_penalty=1.1, logit_bias=((token, 1.0),), logprobs=1
    )
    for group in ((SamplingParams(),) * 2, (SamplingParams(), mixed, plain), (adjusted, mixed)):
        yield from _drive(
            engine,
            [
                Request(f"warm-up-{index}", (token,) * (4 + index), sampling, max_tokens=3)
                for index, sampling in enumerate(group)
            ],
        )
    if engine.mixes_prompts:
        for rows in range(MIXED_ROWS, WARM_ROWS + 1, MIXED_ROWS):
            yield from _drive(engine, _prompts_of(rows, token))
        if engine.kv_memory is not None:  # no request has these prompts as its prefix
            engine.kv_memory.shrink()
            engine.kv_memory.restore()


def _prompts_of(tokens: int, token: int) -> list[Request]:
    """Return prompts with so many tokens in all, which share no cached prefixes."""
    count = -(-tokens // WARM_PROMPT_TOKENS)
    prompts = [(token,) * ((tokens + n) // count) for n in range(count)]
    return [
        Request(f"warm-up-{n}", prompt, SamplingParams(), max_tokens=1, salt=f"{tokens} {n}")
        for n, prompt in enumerate(prompts)
    ]


def _drive(engine: Engine, requests: Iterable[Request]) -> Iterator[None]:
    for request in requests:
        if engine.can_add(request):
            engine.add(request)
    while engine.has_work:
        engine.step()
        yield
