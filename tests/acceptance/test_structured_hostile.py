"""Hostile schemas, regexes and grammars: a clear error within a second, and the batch goes on."""

from __future__ import annotations

import threading
import time
from typing import Any
from unittest.mock import patch

import pytest

from mlx_serving.common.errors import InvalidJob
from mlx_serving.worker.engine.structured.grammar_trial import COMPILE_SECONDS
from tests.support.output_support import decode_one, job, planner, request, tally
from tests.support.schemas_for_tests import schema

SECONDS = 1.0


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


def regex(text: str) -> dict[str, Any]:
    return {"type": "regex", "regex": text}


def grammar(text: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": text}


def doubling(names: str, count: int) -> str:
    rules = [f"{names}{n}: {names}{n + 1} {names}{n + 1}" for n in range(count)]
    return "\n".join([f"start: {names}0", *rules, f'{names}{count}: "y"'])


def unions_of_unions() -> dict[str, Any]:
    parts = [
        {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
        for i in range(12)
    ]
    return {"allOf": parts}


SCHEMA = "response_format.json_schema.schema"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "30,000 deep": (schema(nested(30_000)), SCHEMA),
    "enum of 100,000": (schema({"enum": [f"value {n}" for n in range(100_000)]}), SCHEMA),
    "enum of 4,000 objects": (schema({"enum": [{"a": n} for n in range(4000)]}), SCHEMA),
    "remote reference": (schema({"$ref": "http://127.0.0.1:1/x.json"}), f"{SCHEMA}.$ref"),
    "file reference": (schema({"items": {"$ref": "file:///etc/passwd"}}), f"{SCHEMA}.items.$ref"),
    "reference to nothing": (schema({"$ref": "#/$defs/none"}), f"{SCHEMA}.$ref"),
    "reference to itself": (schema({"$ref": "#"}), SCHEMA),
    "references in a ring": (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                               "b": {"$ref": "#/$defs/a"}}}), SCHEMA),
    "unions of unions": (schema(unions_of_unions()), SCHEMA),
    "a large multiple": (schema({"type": "integer", "multipleOf": 999_983}), SCHEMA),
    "several multiples": (
        schema({"allOf": [{"type": "integer", "multipleOf": n} for n in (101, 103, 107, 109)]}),
        SCHEMA),
    "2,000 optional properties": (
        schema({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(2000)}}),
        SCHEMA),
    "a keyword that no grammar has": (schema({"type": "array", "uniqueItems": True}), SCHEMA),
    "no value is valid": (schema({"type": "integer", "minimum": 5, "maximum": 3}), SCHEMA),
    "wrong types": (schema({"type": "strng"}), SCHEMA),
    "a hundred patterns": (
        schema({"type": "object", "patternProperties": {
            f"^a.{{{n}}}$": {"type": "string"} for n in range(20, 120)}}), SCHEMA),
    "a regex that doesn't end": (regex("(a+)+b("), "response_format.regex"),
    "a regex that looks ahead": (regex("(?=a)b"), "response_format.regex"),
    "an exponential regex": (regex("(a+)+" * 800 + "b"), "response_format.regex"),
    "a long regex": (regex("a" * 5000), "response_format.regex"),
    "30,000 brackets": (grammar("start: " + "(" * 8000 + '"a"' + ")" * 8000),
                        "response_format.grammar"),
    "a rule that isn't there": (grammar("start: nothing"), "response_format.grammar"),
    "rules that double": (grammar(doubling("a", 40)), "response_format.grammar"),
    "terminals that double": (grammar(doubling("A", 40)), "response_format.grammar"),
    "an endless rule": (grammar('start: "a" start'), "response_format.grammar"),
    "conjunctions": (
        grammar("start: A\nA: " + " & ".join(
            f"/(?s:.*)a.{{{n}}}(?s:.*)/" for n in range(20, 60))), "response_format.grammar"),
    "a long chain of rules": (
        grammar("start: a0\n" + "\n".join(f"a{n}:a{n + 1}" for n in range(1300)) + '\na1300: "y"'),
        "response_format.grammar"),
}  # fmt: skip
ALLOWED = {"a long chain of rules"}  # the compiler copes with as many as a job can hold


def refusal(form: dict[str, Any]) -> tuple[InvalidJob | None, float]:
    """The error of a job with this form, and the most seconds that it takes to come.

    These are the seconds of this thread's work, and for each trial all that it may take before it
    is killed: what other processes take of the machine meanwhile says nothing of the form.
    """
    trial = planner()._compiler._trial
    with patch.object(trial, "try_grammar", wraps=trial.try_grammar) as tried:
        began = time.thread_time()
        error = None
        try:
            request(job(response_format=form))
        except InvalidJob as refused:
            error = refused
        return error, time.thread_time() - began + COMPILE_SECONDS * tried.call_count


def warm() -> None:
    """Have the process that tries grammars up, as a worker has before its first claim."""
    planner()
    request(job(response_format={"type": "json_object"}))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_form_is_refused_in_time_by_the_path_of_its_field(name: str) -> None:
    form, path = HOSTILE[name]
    warm()
    error, seconds = refusal(form)
    assert seconds < SECONDS
    if name in ALLOWED and error is None:
        return
    assert error is not None
    assert error.code in {"invalid_schema", "invalid_job"}
    assert error.errors[0].path.startswith(path.partition(".schema.items")[0])
    assert 0 < len(error.errors[0].reason) < 400


@pytest.mark.quiet  # the batch's gaps are a clock's seconds
def test_the_batch_goes_on_while_hostile_forms_are_tried() -> None:
    warm()
    engine = tally()
    counting = job(messages=[{"role": "user", "content": "count from 1 to 300"}], max_tokens=2000)
    engine.add(request(counting))
    hostile = [regex("(a+)+" * 790 + "b"), schema({"type": "integer", "multipleOf": 999_979})]
    refused: list[InvalidJob | None] = []
    thread = threading.Thread(target=lambda: refused.extend(refusal(form)[0] for form in hostile))
    thread.start()
    gaps = []
    while thread.is_alive():
        began = time.monotonic()
        engine.step()
        gaps.append(time.monotonic() - began)
    assert engine.running == 1
    engine.abort("job:1")
    assert all(refused)
    assert len(refused) == len(hostile)
    assert len(gaps) >= 20
    assert max(gaps) < SECONDS / 2


def test_a_crash_of_the_trial_harms_no_other_grammar() -> None:
    warm()
    trial = planner()._compiler._trial
    process = trial._process
    assert process is not None
    process.kill()
    process.wait()
    assert decode_one(request(job(response_format=regex("ab?")))).finish_reason == "stop"


@pytest.mark.quiet
def test_a_grammar_that_overflows_the_stack_kills_the_trial_alone() -> None:
    """Longer than any job's may be: straight to the compiler."""
    warm()
    compiler = planner()._compiler
    text = "start: a0\n" + "\n".join(f'a{n}: a{n + 1} "x"' for n in range(20_000)) + '\na20000: "y"'
    with pytest.raises(InvalidJob, match="grammar: can't be compiled"):
        compiler.compile(text, "grammar")
    compiler.compile('start: "still here"', "grammar")


def test_refusals_are_remembered() -> None:
    warm()
    form, _ = HOSTILE["several multiples"]
    refusal(form)
    error, seconds = refusal(form)
    assert error is not None
    assert seconds < 0.1
