"""A hundred schemas at temperature 1: whatever was finished is valid."""

from __future__ import annotations

import json

import jsonschema

from tests.support.output_support import decode, job, request
from tests.support.schemas_for_tests import schemas

MAX_TOKENS = 300


def test_every_finished_output_of_a_hundred_schemas_is_valid() -> None:
    found = schemas()
    assert len(found) == 100
    requests = []
    for index, schema in enumerate(found):
        form = {"type": "json_schema", "json_schema": {"name": f"s{index}", "schema": schema}}
        made = job(response_format=form, temperature=1.0, seed=index, max_tokens=MAX_TOKENS)
        requests.append(request(made, str(index)))
    rows = decode(requests)
    finished = [index for index in range(100) if rows[str(index)].finish_reason == "stop"]
    for index in finished:
        validator = jsonschema.Draft202012Validator(
            found[index], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        validator.validate(json.loads(rows[str(index)].text))
    assert {row.finish_reason for row in rows.values()} <= {"stop", "length"}
    assert len(finished) >= 90, "nearly all come to an end, or little is shown"
