"""Builds tiny engines, drives them, and decodes by mlx-lm itself for comparison."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
from mlx_lm.generate import generate_step

from benchmarks.lib.synthetic import TINY, build_model, build_tokenizer
from mlx_serving.worker.engine import acceleration, loader
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo, Output, Request, SamplingParams
from mlx_serving.worker.engine.kv.choice import CacheChoice, paged_choice
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.loader import EngineOptions, build_engine
from mlx_serving.worker.engine.model_runner import ModelRunner
from mlx_serving.worker.engine.text import marked_detokenizer
from tests.support.model_families import CONVOLUTIONAL

EOS = 256
GREEDY = SamplingParams()
POISON = 299  # a token id that only poisoned prompts hold

HYBRID: dict[str, Any] = {
    **TINY,
    **CONVOLUTIONAL,
    "norm_eps": 1e-6,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_hidden_layers": 4,
}
SLIDING: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 3,
    "sliding_window": 24,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 16,
}
RECURRENT: dict[str, Any] = {
    "vocab_size": TINY["vocab_size"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "state_size": 8,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}


@dataclass
class Collected:
    """All outputs of one row, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error_code: str | None = None
    outputs: int = 0
    cached_tokens: int = field(default=0, compare=False)

    def add(self, output: Output) -> None:
        assert self.finish_reason is None, "nothing follows the last output"
        self.token_ids += output.token_ids
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.error_code = output.error.code if output.error else None
        self.outputs += 1
        self.cached_tokens = output.cached_tokens


class PoisonedModel:
    """NaN logits for rows whose input token is POISON; or an exception in their prefill."""

    def __init__(self, *, raises: bool = False, value: float = float("nan")) -> None:
        self.model = build_model()
        self.layers = self.model.layers  # type: ignore[attr-defined]
        self.raises = raises
        self.value = value

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        poisoned = (inputs == POISON).any(axis=1)
        if self.raises and poisoned.any().item():
            message = "a prompt like 'top secret' can't be computed"
            raise RuntimeError(message)
        logits = self.model(inputs, cache=cache)
        return mx.where(poisoned[:, None, None], self.value, logits)


def other_model(module: Any, config: dict[str, Any]) -> Any:
    mx.random.seed(1)
    name = module.__name__.rsplit(".", 1)[-1]
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **config}))
    mx.eval(model.parameters())
    return model


def tiny_engine(
    model: LanguageModel | None = None,
    *,
    eos: Iterable[int] = (EOS,),
    rows: int = 40,
    chunk: int = 64,
    kv_budget_bytes: int = 1 << 28,
    paged: bool = False,
    prefix_cache_bytes: int | None = 0,
) -> Engine:
    """An engine over a tiny random model in memory; `paged`: on the paged cache's reference."""
    info = ModelInfo("tiny", "revision", "hash", TINY["vocab_size"], frozenset(eos))
    options = EngineOptions(
        max_batch_rows=rows,
        kv_budget_bytes=kv_budget_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        prefill_chunk_tokens=chunk,
        first_chunk_tokens=chunk,
    )
    if model is None:
        model = _shared_model()
    choice = checked_choice(model) if paged else None
    assert choice is None or choice.block_tokens, choice.report
    runner = ModelRunner(model, choice)
    with _proven_once():
        engine = build_engine(runner, _shared_tokenizer(), info, options)
    engine._clock = float  # 0.0: however slow this machine is now, chunks keep their size
    return engine


@cache
def _shared_model() -> LanguageModel:
    return build_model()


@cache
def _shared_tokenizer() -> Any:
    return build_tokenizer()


CHECKED: dict[int, tuple[LanguageModel, CacheChoice]] = {}  # by id; the model keeps its own


def checked_choice(model: LanguageModel) -> CacheChoice:
    """The paged cache of a model; its check runs ten steps, so once a model is enough."""
    if id(model) not in CHECKED:
        CHECKED[id(model)] = model, paged_choice(model, ReferenceOps())
    return CHECKED[id(model)][1]


_choose_sampler = cache(acceleration.choose_sampler)
_choose_detokenizer = cache(acceleration.choose_detokenizer)


@contextmanager
def _proven_once() -> Iterator[None]:
    """Have native pieces prove themselves once in this process, and not in each engine."""
    with (
        patch.object(loader, "choose_sampler", _choose_sampler),
        patch.object(acceleration, "choose_detokenizer", _choose_detokenizer),
        patch.object(marked_detokenizer, "choose_detokenizer", _choose_detokenizer),
    ):
        yield


def random_requests(count: int, seed: int, sampling: SamplingParams = GREEDY) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            f"r{index}",
            tuple(chance.randrange(256) for _ in range(chance.choice([1, 2, 7, 30, 64, 150]))),
            sampling,
            max_tokens=chance.randrange(1, 40),
        )
        for index in range(count)
    ]


def drive(
    engine: Engine,
    requests: Iterable[Request],
    *,
    every: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> dict[str, Collected]:
    """Run requests to their end: all added at once, or one every `every` steps."""
    pending = list(requests)
    collected = defaultdict(Collected, {request.id: Collected() for request in pending})
    step = 0
    while pending or engine.has_work:
        count = len(pending) if not every else int(step % every == 0)
        while pending and count and engine.can_add(pending[0]):
            engine.add(pending.pop(0))
            count -= 1
        on_step(step)
        for output in engine.step():
            collected[output.request_id].add(output)
        step += 1
        assert step < 10_000, "the engine makes no progress"
    assert (engine.running, engine.waiting, engine.kv_tokens_used) == (0, 0, 0)
    return collected


def prefixes_of(engine: Engine) -> PrefixCache:
    """The engine's prefix cache."""
    prefixes = engine._scheduler._prefixes
    assert prefixes is not None
    return prefixes


def greedy_by_mlx_lm(
    model: LanguageModel, prompt: Iterable[int], max_tokens: int, eos: Iterable[int] = (EOS,)
) -> list[int]:
    """mlx-lm's own greedy decoding of one prompt, the end-of-sequence token included."""
    tokens: list[int] = []
    stops = set(eos)
    steps = generate_step(mx.array(list(prompt)), cast("Any", model), max_tokens=max_tokens)
    for token, _ in steps:
        tokens.append(int(token))
        if token in stops:
            break
    return tokens
