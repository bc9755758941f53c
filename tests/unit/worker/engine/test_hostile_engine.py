"""Rows that can't be computed, side by side: each ends alone, and the rest is right."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from benchmarks.lib.synthetic import TINY, build_model
from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from tests.support.engine_support import GREEDY, drive, greedy_by_mlx_lm, tiny_engine

NAN, OOM = 299, 298  # token ids that only hostile prompts hold
GOOD = [Request(f"good{n}", (n + 1, 5, 9), GREEDY, 12) for n in range(4)]


class HostileModel:
    """NaN logits where a prompt holds NAN; an exception in the prefill of one that holds OOM."""

    def __init__(self, error: BaseException) -> None:
        self.model = build_model()
        self.layers = self.model.layers  # type: ignore[attr-defined]
        self.error = error

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        if (inputs == OOM).any().item():
            raise self.error
        logits = self.model(inputs, cache=cache)
        return mx.where((inputs == NAN).any(axis=1)[:, None, None], float("nan"), logits)


ERRORS = [
    (MemoryError("a prompt like 'top secret'"), "out_of_memory"),
    (
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes, greater than the maximum"),
        "out_of_memory",
    ),
    (OverflowError("a prompt like 'top secret'"), "prefill_failed"),
    (RecursionError(), "prefill_failed"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("padding", [0, 150], ids=["shared prefill", "long prompt"])
def test_nan_memory_and_good_rows_in_one_batch(error: Exception, code: str, padding: int) -> None:
    model = HostileModel(error)
    hostile = [
        Request("nan", (3, 4, NAN), GREEDY, 12),
        Request("oom", (3,) * padding + (OOM, 4), GREEDY, 12),
        Request("nan, sampled", (3, 4, NAN), SamplingParams(1.0, top_p=0.9, seed=1), 12),
    ]
    collected = drive(tiny_engine(model), [*GOOD[:2], *hostile, *GOOD[2:]])
    codes = {name: collected[name].error_code for name in ("nan", "oom", "nan, sampled")}
    assert codes == {"nan": "nan_logits", "oom": code, "nan, sampled": "nan_logits"}
    for request in GOOD:
        expected = greedy_by_mlx_lm(model.model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ERRORS[0][0], "the device ran out of memory over this request"),
        (ERRORS[2][0], "prefill raised OverflowError"),
    ],
)
def test_the_errors_words_stay_inside(error: Exception, message: str) -> None:
    engine = tiny_engine(HostileModel(error))
    engine.add(Request("oom", (OOM, 4), GREEDY, 12))
    outputs = [output for _ in range(2) for output in engine.step()]
    assert [output.error and output.error.message for output in outputs] == [message]


@pytest.mark.parametrize("token", [TINY["vocab_size"], 2**31, 2**63, 10**30, -1, -(2**63)])
@pytest.mark.parametrize("where", ["prompt", "committed"])
def test_an_id_outside_the_vocabulary_never_reaches_the_model(token: int, where: str) -> None:
    model = HostileModel(AssertionError("computed"))
    engine = tiny_engine(model)
    tokens = {"prompt": (1,), "committed": (1,)} | {where: (1, token)}
    request = Request(
        "bad", tokens["prompt"], GREEDY, 4, choices=(RequestChoice(0, tokens["committed"]),)
    )
    with pytest.raises(RequestRefusedError, match=f"^{where}: ") as refusal:
        engine.add(request)
    assert refusal.value.code == "token_out_of_vocabulary"
    assert not engine.has_work
