"""An engine whose device orders kernels by data alone, as Metal does, as far as a CPU can tell."""

from functools import cache

from benchmarks.lib.synthetic import build_model, build_tokenizer
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo
from mlx_serving.worker.engine.kv.choice import CacheChoice, paged_choice
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.loader import EngineOptions, build_engine
from mlx_serving.worker.engine.model_runner import ModelRunner


class Unordered(ReferenceOps):
    """As on Metal."""

    ordered_by_stream = False


def engine_on(ops: type[ReferenceOps]) -> Engine:
    runner = ModelRunner(*_checked(ordered=ops.ordered_by_stream))
    info = ModelInfo("tiny", "revision", "hash", 300, frozenset())
    options = EngineOptions(max_batch_rows=3, kv_budget_bytes=1 << 22, prefill_chunk_tokens=64)
    return build_engine(runner, build_tokenizer(), info, options)


@cache
def _checked(*, ordered: bool) -> tuple[LanguageModel, CacheChoice]:
    """The model that the engines share; its check takes seconds, so once is enough."""
    model = build_model()
    return model, paged_choice(model, ReferenceOps() if ordered else Unordered())
