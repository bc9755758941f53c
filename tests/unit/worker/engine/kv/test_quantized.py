"""Keys and values in few bits: what a job gets does not depend on who runs beside it."""

import random
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, mamba
from msgspec.structs import replace

from benchmarks.lib.synthetic import TINY, build_model, build_tokenizer
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.settings import load_settings
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo, Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.kv.choice import (
    choose_cache,
    padded_choice,
    quantized_choice,
)
from mlx_serving.worker.engine.kv.padded import LanguageModel, UnsupportedModelError
from mlx_serving.worker.engine.kv.quantized import KvBits
from mlx_serving.worker.engine.loader import EngineOptions, build_engine
from mlx_serving.worker.engine.model_runner import ModelRunner
from tests.support.engine_support import GREEDY, RECURRENT, SLIDING, Collected, drive, other_model

SAMPLED = SamplingParams(0.9, top_p=0.9, seed=3)


@pytest.fixture(scope="module", params=[(64, 2), (32, 4)], ids=["64, grouped heads", "32"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    head_dim, kv_heads = request.param
    return build_model(head_dim=head_dim, num_key_value_heads=kv_heads)


def engine_of(model: LanguageModel, bits: KvBits, *, rows: int = 40, chunk: int = 64) -> Engine:
    info = ModelInfo("tiny", "revision", "hash", TINY["vocab_size"], frozenset({256}))
    options = EngineOptions(
        max_batch_rows=rows, kv_budget_bytes=1 << 28, prefill_chunk_tokens=chunk
    )
    runner = ModelRunner(model, quantized_choice(model, bits))
    return build_engine(runner, build_tokenizer(), info, options)


def requests(count: int = 9) -> list[Request]:
    chance = random.Random(1)
    return [
        Request(
            f"r{n}",
            tuple(chance.randrange(256) for _ in range(chance.choice([1, 5, 20, 30, 150]))),
            (GREEDY, SAMPLED)[n % 2],
            chance.randrange(3, 30),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_every_row_is_as_alone_whoever_comes_and_goes(model: LanguageModel, bits: KvBits) -> None:
    jobs = requests()
    alone: dict[str, Collected] = {}
    for job in jobs:
        alone |= drive(engine_of(model, bits), [job])
    assert drive(engine_of(model, bits, rows=5), jobs, every=2) == alone
    assert drive(engine_of(model, bits), jobs) == alone
    assert len({tuple(row.token_ids) for row in alone.values()}) > 4


def test_a_row_that_resumes_goes_on_as_it_would_have(model: LanguageModel) -> None:
    job = Request("long", tuple(range(30)), SAMPLED, 24)
    whole = drive(engine_of(model, 4), [job])["long"].token_ids
    assert len(whole) > 8
    for cut in (1, 7):
        rest = Request(
            "long", job.prompt, SAMPLED, 24, choices=(RequestChoice(0, tuple(whole[:cut])),)
        )
        assert drive(engine_of(model, 4), [rest])["long"].token_ids == whole[cut:]


def test_choices_share_their_prompt(model: LanguageModel) -> None:
    asked = Request("n", tuple(range(9)), SAMPLED, 6, choices=tuple(map(RequestChoice, range(3))))
    engine = engine_of(model, 8)
    engine.add(asked)
    got: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            got.setdefault(output.choice, []).extend(output.token_ids)
    for choice in asked.choices:
        alone = drive(engine_of(model, 8), [replace(asked, choices=(choice,))])
        assert alone["n"].token_ids == got[choice.index]


def test_eight_bits_are_close_to_what_the_model_computes(model: LanguageModel) -> None:
    info = ModelInfo("tiny", "revision", "hash", TINY["vocab_size"], frozenset({256}))
    plain = build_engine(
        ModelRunner(model, padded_choice(model, "")), build_tokenizer(), info, EngineOptions()
    )
    jobs = [Request(f"r{n}", tuple(range(n, n + 20)), GREEDY, 4) for n in range(20)]
    exact, close = drive(plain, jobs), drive(engine_of(model, 8), jobs)
    same = sum(exact[job.id].token_ids[0] == close[job.id].token_ids[0] for job in jobs)
    assert same >= 18, same


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.25, 0.33), (4, 0.12, 0.22)])
def test_a_token_takes_so_much_of_what_float32_takes(
    model: LanguageModel, bits: KvBits, least: float, most: float
) -> None:
    plain = ModelRunner(model, padded_choice(model, "")).cost.bytes_per_token
    assert (
        least
        < ModelRunner(model, quantized_choice(model, bits)).cost.bytes_per_token / plain
        < most
    )


@pytest.mark.parametrize(
    ("module", "config"), [(gemma3_text, SLIDING), (mamba, RECURRENT)], ids=["sliding", "recurrent"]
)
def test_models_with_other_layers_are_refused_by_name(module: Any, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^cache\.bits: layer \d keeps a \w+Cache: "):
        choose_cache(other_model(module, config), bits=8)


def test_heads_that_no_group_divides_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^cache\.bits: heads of 16 can't be kept"):
        choose_cache(build_model(), bits=8)


def test_it_says_what_it_does(model: LanguageModel) -> None:
    choice = choose_cache(model, bits=4)
    assert str(choice.report).startswith("paged KV cache: off (cache.bits=4: padded")


def test_the_setting_and_what_it_goes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().cache.bits is None
    monkeypatch.setenv("MLX_SERVING_CACHE_BITS", "8")
    assert load_settings().cache.bits == 8
    with pytest.raises(InvalidSettings, match=r"cache\.bits: needs a padded cache"):
        load_settings(cache__kind="paged")
    with pytest.raises(InvalidSettings, match=r"cache\.bits"):
        load_settings(cache__bits=3)


def test_an_empty_cache_takes_nothing(model: LanguageModel) -> None:
    engine = engine_of(model, 8)
    assert cast("Any", engine._runner).kv_bytes == 0
    drive(engine, requests(3))
    assert cast("Any", engine._runner).kv_bytes == 0
    mx.clear_cache()
