"""Rows that follow grammars, beside rows that don't: masks, ends, resume, failures."""

from __future__ import annotations

import json
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace

from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.structured.masks import (
    BatchMasks,
    Matcher,
    words_of,
)
from tests.support.output_support import decode, decode_one, job, planner, request, resumed, tally

OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {
            "type": "array",
            "items": {"enum": ["é", "🙂", "x"]},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def regex(text: str) -> dict[str, Any]:
    return {"type": "regex", "regex": text}


def object_form() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}


def grammar_of(text: str) -> Matcher:
    return planner()._compiler.compile(text, "grammar").start()


def allowed(matcher: Matcher, vocab_size: int = 336) -> set[int]:
    bitmask = np.array(BatchMasks([matcher], vocab_size).compute())
    assert bitmask.shape == (1, words_of(vocab_size))
    return set(np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little")).tolist())


def token(text: str) -> int:
    (found,) = tally().tokenizer.encode(text, add_special_tokens=False)
    return int(found)


EOS = {0, 2}


def test_the_end_of_sequence_is_allowed_exactly_where_the_grammar_accepts() -> None:
    matcher = grammar_of('start: "a" "b"? "c"')
    assert allowed(matcher) == {token("a")}
    matcher.advance(token("a"))
    assert allowed(matcher) == {token("b"), token("c")}
    matcher.advance(token("c"))
    assert matcher.ended
    assert allowed(matcher) == EOS
    optional = grammar_of('start: "a" "b"?')
    optional.advance(token("a"))
    assert allowed(optional) == EOS | {token("b")}
    assert not optional.ended


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    """Models are often wider than their tokenizer."""
    from mlx_serving.worker.engine.structured.grammar_compiler import (
        GrammarCompiler,
        tokenizer_source,
    )

    compiler = GrammarCompiler(tokenizer_source(tally().tokenizer, 500, frozenset(EOS)))
    try:
        matcher = compiler.compile("start: /(?s:.*)/", "grammar").start()
        found = allowed(matcher, 500)
    finally:
        compiler.close()
    assert max(found) < 336
    assert found >= EOS
    reserved = {t for t in range(336) if tally().tokenizer.decode([t]).startswith("<|")}
    assert found & reserved == EOS & reserved


def test_a_model_narrower_than_its_tokenizer_gets_masks_of_its_own_width() -> None:
    assert allowed(grammar_of('start: "a"'), 64) == set()


def test_the_text_follows_the_grammar_and_ends_with_it() -> None:
    row = decode_one(request(job(response_format=regex("[0-9]{3}-[a-z]{2}"), seed=3)))
    assert row.finish_reason == "stop"
    assert len(row.text) == 6
    assert not set(row.token_ids) & EOS, "nothing can follow, so nothing is waited for"


@pytest.mark.parametrize("seed", range(4))
def test_json_object_gives_an_object(seed: int) -> None:
    form = {"type": "json_object"}
    row = decode_one(request(job(response_format=form, seed=seed, temperature=0.5)))
    assert isinstance(json.loads(row.text), dict)


def test_max_tokens_and_stop_strings_end_a_constrained_row_as_any() -> None:
    form = regex("[a-z]{40}STOP[a-z]*")
    short = decode_one(request(job(response_format=form, max_tokens=5)))
    assert (short.finish_reason, len(short.token_ids)) == ("length", 5)
    stopped = decode_one(request(job(response_format=form, stop=["STOP"])))
    assert stopped.finish_reason == "stop"
    assert "STOP" not in stopped.text


def test_free_rows_get_the_tokens_that_they_get_without_constrained_mates() -> None:
    free = [
        request(job(messages=[{"role": "user", "content": f"dice {30 + n}"}], seed=n), f"free{n}")
        for n in range(6)
    ]
    constrained = [
        request(job(response_format=object_form(), seed=n), f"bound{n}") for n in range(6)
    ]
    alone = decode(free)
    mixed = decode([one for pair in zip(free, constrained, strict=True) for one in pair])
    for one in free:
        name = one.id.partition(":")[0]
        assert mixed[name].token_ids == alone[name].token_ids
        assert mixed[name].text == alone[name].text


def test_a_constrained_row_gets_the_same_tokens_alone_and_among_others() -> None:
    ones = [request(job(response_format=object_form(), seed=n), f"bound{n}") for n in range(8)]
    together = decode(ones)
    for one in ones:
        assert decode_one(one).token_ids == together[one.id.partition(":")[0]].token_ids


def test_sampling_parameters_work_within_the_mask() -> None:
    greedy = decode_one(request(job(response_format=object_form(), temperature=0)))
    again = decode_one(request(job(response_format=object_form(), temperature=1, top_k=1, seed=9)))
    assert greedy.token_ids == again.token_ids
    texts = {decode_one(request(job(response_format=object_form(), seed=n))).text for n in range(5)}
    assert len(texts) > 1


def test_a_row_resumes_at_every_point_of_its_grammar() -> None:
    one = request(job(response_format=object_form(), seed=4))
    straight = decode_one(one)
    assert straight.finish_reason == "stop"
    cuts = [resumed(one, straight.token_ids[:cut]) for cut in range(1, len(straight.token_ids))]
    named = [replace(cut, id=f"cut{index}:2") for index, cut in enumerate(cuts)]
    rows = decode(named)
    for index, cut in enumerate(named):
        row = rows[f"cut{index}"]
        assert [*cut.choices[0].committed, *row.token_ids] == straight.token_ids
        assert row.finish_reason == "stop"


def test_a_row_whose_grammar_had_ended_ends_at_once() -> None:
    one = request(job(response_format=regex("ab"), seed=4))
    straight = decode_one(one)
    row = decode_one(resumed(one, straight.token_ids))
    assert (row.token_ids, row.text, row.finish_reason) == ([], "", "stop")


def test_committed_tokens_that_the_grammar_forbids_fail_that_row_alone() -> None:
    one = resumed(request(job(response_format=regex("ab"))), [token("z")])
    other = request(job(temperature=0), "other")
    rows = decode([one, other])
    assert rows["job"].error is not None
    assert rows["job"].error.code == "grammar_failed"
    assert rows["other"].finish_reason == "stop"


def test_a_grammar_that_grows_too_complex_fails_its_row_alone() -> None:
    """Compiles and begins well; what comes later is more than a mask may cost."""
    text = 'start: /[a-c]{12}/ tail\ntail: "x" tail'
    compiled = planner()._compiler.compile(json.dumps({"grammars": [{"lark_grammar": text}]}), "g")
    prompt = tuple(tally().tokenizer.encode("hello"))
    bad = Request("bad:1", prompt, SamplingParams(), 100, grammar=compiled)
    other = request(job(temperature=0), "other")
    rows = decode([bad, other])
    assert rows["bad"].finish_reason == "error"
    assert rows["bad"].error is not None
    assert rows["bad"].error.code == "grammar_failed"
    assert len(rows["bad"].text) in {11, 12}
    assert rows["other"].finish_reason == "stop"


def test_rows_that_join_and_leave_keep_their_own_masks() -> None:
    """One job's schema never rules another's text, whoever comes and goes between."""
    engine = tally()
    letters = [request(job(response_format=regex(f"{c}{{{5 + n}}}")), f"row{n}")
               for n, c in enumerate("abcdefgh")]  # fmt: skip
    rows: dict[str, str] = {}
    pending = list(letters)
    while pending or engine.has_work:
        if pending:
            engine.add(pending.pop(0))
        for output in engine.step():
            rows[output.request_id] = rows.get(output.request_id, "") + output.text
    assert [rows[f"row{n}:1"] for n in range(8)] == [c * (5 + n) for n, c in enumerate("abcdefgh")]


def test_masks_are_computed_while_the_forward_pass_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launching a step takes the host as long as masks do: one after the other was 1.7 steps."""
    seen: list[str] = []
    start, launch, compute = BatchMasks.start, mx.async_eval, BatchMasks.compute
    launched = threading.Event()

    def started(self: BatchMasks, sampled: Any) -> Any:
        seen.append("start")
        launched.clear()
        return start(self, sampled)

    def launches(*arrays: Any) -> None:
        launch(*arrays)
        launched.set()

    def computed(self: BatchMasks) -> mx.array:
        seen.append("beside the launch" if launched.wait(5) else "before it")
        return compute(self)

    monkeypatch.setattr(BatchMasks, "start", started)
    monkeypatch.setattr(BatchMasks, "compute", computed)
    monkeypatch.setattr(mx, "async_eval", launches)
    row = decode_one(request(job(response_format=regex("[0-9]{3}-[a-z]{2}"), seed=3)))
    assert len(row.text) == 6
    assert len(seen) >= 12
    assert seen == ["start", "beside the launch"] * (len(seen) // 2)
