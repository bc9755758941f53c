"""Writes docs/reference/parameters.md, every field of a job, and settings.md beside it.

    python scripts/parameters_page.py          # writes the pages
    python scripts/parameters_page.py --print  # shows them

Meaning, type, range and default are the schema's own (`GenerationJob`, `Settings`); only the test
that shows a field at work, and the page that explains a table of settings, are named here, held by
`tests/unit/house/test_parameters_page.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from mlx_serving.common.job.checks import UNSUPPORTED
from mlx_serving.common.job.schema import FEATURE_PROTOCOL, GenerationJob
from mlx_serving.common.settings import ENV_PREFIX, TABLES, Settings, variable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "reference" / "parameters.md"
SETTINGS_PAGE: Final = ROOT / "docs" / "reference" / "settings.md"
_ENGINE: Final = "tests/acceptance/test_parameters_engine.py"
_CHOICES: Final = "tests/acceptance/test_choices_tally.py"
_TOOLS: Final = "tests/acceptance/test_tool_calls_engine.py"
_TIME: Final = "tests/integration/test_worker_cancel.py::TestTime"
_REFUSED: Final = (
    "tests/unit/common/test_jobs_malformed.py::test_what_the_engine_cannot_do_is_refused_by_name"
)

SHOWN_BY: Final[dict[str, str]] = {
    "v": "tests/unit/common/test_jobs.py::test_the_wire_form_leaves_defaults_out",
    "kind": _REFUSED,
    "model": "tests/integration/test_client_submit.py::TestSubmit::"
    "test_a_job_is_queued_where_rq_sees_it",
    "messages": f"{_ENGINE}::test_messages_pass_the_chat_template_and_a_prompt_does_not",
    "prompt": f"{_ENGINE}::test_messages_pass_the_chat_template_and_a_prompt_does_not",
    "tools": f"{_TOOLS}::test_a_call_is_no_text_and_ends_the_choice_as_such",
    "tool_choice": f"{_TOOLS}::test_required_forces_a_call_of_one_of_the_tools",
    "chat_template_kwargs": "tests/unit/worker/engine/test_prompts.py::test_what_the_model_reads",
    "adapter": _REFUSED,
    "max_tokens": f"{_ENGINE}::test_max_tokens_ends_a_choice",
    "stop": f"{_ENGINE}::test_a_stop_string_ends_a_choice_and_is_not_in_it",
    "n": f"{_CHOICES}::test_choices_are_drawn_apart_and_each_the_same_every_time",
    "temperature": f"{_ENGINE}::test_temperature_0_takes_the_likeliest_and_1_does_not",
    "top_p": f"{_ENGINE}::test_a_filter_that_leaves_one_token_takes_the_likeliest",
    "top_k": f"{_ENGINE}::test_a_filter_that_leaves_one_token_takes_the_likeliest",
    "min_p": f"{_ENGINE}::test_a_filter_that_leaves_one_token_takes_the_likeliest",
    "seed": f"{_ENGINE}::test_a_seed_gives_its_tokens_again_and_another_does_not",
    "repetition_penalty": f"{_CHOICES}::test_each_penalty_changes_what_is_drawn",
    "presence_penalty": f"{_CHOICES}::test_each_penalty_changes_what_is_drawn",
    "frequency_penalty": f"{_CHOICES}::test_each_penalty_changes_what_is_drawn",
    "logit_bias": f"{_CHOICES}::test_a_bias_forces_a_token_and_a_penalty_breaks_the_run",
    "logprobs": f"{_CHOICES}::test_log_probabilities_name_every_token",
    "top_logprobs": f"{_CHOICES}::test_log_probabilities_name_every_token",
    "response_format": "tests/acceptance/test_structured_tally.py::"
    "test_a_schema_is_kept_to_over_the_wire",
    "lane": "tests/integration/test_protocol_claim.py::test_lanes_are_served_in_order_of_priority",
    "stream": "tests/integration/test_worker_cancel.py::"
    "test_jobs_that_do_not_stream_publish_no_tokens_and_commit_by_the_batch",
    "deadline": f"{_TIME}::test_a_job_over_its_time_expires_with_its_text",
    "timeout": f"{_TIME}::test_a_job_over_its_time_expires_with_its_text",
    "abandon_after": f"{_TIME}::test_a_job_nobody_listens_to_is_given_up",
    "result_ttl": "tests/integration/test_client_submit.py::TestSubmit::"
    "test_a_result_is_kept_as_long_as_the_job_says",
    "max_attempts": "tests/integration/test_crash_worker.py::test_a_dead_job_raises_what_it_is",
    "on_model_change": "tests/integration/test_resume_reset.py::"
    "test_with_leave_it_begins_anew_after_a_reset_event",
    "idempotency_key": "tests/integration/test_client_submit.py::TestSubmit::"
    "test_an_idempotency_key_enqueues_once",
    "tenant": "tests/acceptance/test_prefix_tally.py::"
    "test_usage_reports_hits_to_the_tenant_that_had_the_prompt_before",
    "metadata": "tests/unit/common/test_jobs.py::test_the_wire_form_is_read_back_equal",
    "traceparent": "tests/integration/test_metrics_endpoint.py::"
    "test_every_record_on_a_job_names_job_attempt_and_trace",
}
"""From a field of a job to the test that shows what it does."""

TABLE_PAGES: Final[dict[str, str]] = {
    "jobs": "../how-to/security.md",
    "models": "../explanation/models.md",
    "batch": "../explanation/engine.md",
    "cache": "../explanation/engine.md",
    "engine": "../explanation/memory.md",
    "worker": "protocol.md",
    "conditions": "../how-to/operations.md",
    "metrics": "../how-to/operations.md",
}
"""From a table of settings to the page that explains it."""

_SETTINGS_HEAD: Final = f"""\
# Settings

Workers, producers and the command line read the same settings, once, when they start. Each has a
default that works. A file has a table for each subject:

```toml
[redis]
url = "rediss://queue.internal:6379/0"

[batch]
max_rows = 32

[models]
qwen = "/Users/me/models/Qwen3-0.6B"
```

| a setting comes from | it is written |
| --- | --- |
| a keyword | `load_settings(batch__max_rows=32)` |
| the environment | `{variable(("batch", "max_rows"))}=32` |
| `mlx-serving.toml` in the working folder, or the file that `{ENV_PREFIX}CONFIG` names | as above |

The first of them that gives a setting wins. In the environment a list is `a,b`, and a table of
aliases (`{variable(("models",))}`, `{variable(("redis", "by_model"))}`) is JSON. A wrong value, or
an unknown name in a file, is `invalid_settings` with the setting's path, as `batch.max_rows`. An
unknown name in the environment is a warning.

Some things are no settings here, because a library has a variable for them: RQ's prefix
(`RQ_KEY_PREFIX`), a hub's URL (`HF_ENDPOINT`) and the folder for its files (`HF_HUB_CACHE`). The
wired limit of macOS is left alone ([memory.md](../explanation/memory.md)).

This page is written by `python scripts/parameters_page.py` from the schema.
"""

_HEAD: Final = """\
# Parameters of a job

Every field of `GenerationJob`, as the schema has it: this page is written by
`python scripts/parameters_page.py`, and a test holds the two together. The names are those of the
OpenAI chat API where it has them. A field is honoured, or refused with its path and the reason;
none is ignored. Null is as good as not given.
"""


def page() -> str:
    """The page's text."""
    return f"{_HEAD}\n{_fields()}\n{_refused()}"


def settings_page() -> str:
    """The settings page's text."""
    return "\n".join([_SETTINGS_HEAD, *map(_settings, Settings.model_fields)])


def _fields() -> str:
    properties = GenerationJob.model_json_schema()["properties"]
    rows = [_row(name, properties[name]) for name in GenerationJob.model_fields]
    return _table(("field", "meaning", "type, range", "default", "shown by"), rows)


def _row(name: str, schema: dict[str, Any]) -> tuple[str, ...]:
    field = GenerationJob.model_fields[name]
    aliases = getattr(field.validation_alias, "choices", [name])
    also = "".join(f" (or `{alias}`)" for alias in aliases if alias != name)
    later = FEATURE_PROTOCOL.get(name)
    protocol = f" (protocol {later})" if later else ""
    whole = field.get_default(call_default_factory=True)
    default = "needed" if field.is_required() else _code(whole)
    meaning = f"{field.description}{protocol}"
    return f"`{name}`{also}", meaning, _kind(schema), default, _link(SHOWN_BY[name])


def _refused() -> str:
    rows = [(f"`{row.field}`", ", ".join(map(_code, row.neutral)), row.reason)
            for row in UNSUPPORTED]  # fmt: skip
    table = _table(("field", "what may stand there", "else"), rows)
    return f"""\
## What is refused yet

{table}
No text parameter is among them. What a model can't do is refused by the worker, by the field's
path: tools for a model of which mlx-lm knows no format of calls, messages for one without a chat
template, a schema that no grammar has (`invalid_schema`), a part of a tool's schema that the
model's format of calls can't write ([structured output](../explanation/structured_output.md)).
"""


def _settings(table: str) -> str:
    """One table's section; the aliases of `models` have one row."""
    holder = TABLES.get(table, Settings)
    names = list(holder.model_fields) if table in TABLES else [table]
    properties = holder.model_json_schema()["properties"]
    rows = [
        (
            f"`{name}`" if table in TABLES else "*alias*",
            holder.model_fields[name].description or "",
            _kind(properties[name]),
            _default(holder.model_fields[name]),
        )
        for name in names
    ]
    about = holder.__doc__ if table in TABLES else "Models by alias, which jobs name."
    page = TABLE_PAGES.get(table)
    more = f" More: [{Path(page).name}]({page})." if page else ""
    columns = ("setting", "meaning", "type, range", "default")
    return f"## `[{table}]`\n\n{about}{more}\n\n{_table(columns, rows)}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field is Settings.model_fields["models"]:
        return "`tally`, the tiny model"
    shown = default.get_secret_value() if isinstance(default, SecretStr) else default
    return "none" if shown in ((), {}) else _code(shown)


def _kind(schema: dict[str, Any]) -> str:
    """Type and range in words."""
    if not schema.keys() - {"default", "title", "description"}:
        return "any JSON"
    if "anyOf" in schema:
        kinds = [_kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "const" in schema or "enum" in schema:
        return ", ".join(map(_code, schema.get("enum", [schema.get("const")])))
    if "$ref" in schema:
        return "any JSON" if schema["$ref"].endswith("JsonValue") else "object"
    if schema.get("type") == "array":
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {_kind(schema['items'])}{most}"
    names = {"string": "text", "integer": "whole number", "boolean": "true, false"}
    kind = names.get(schema.get("type", ""), schema.get("type", "any JSON"))
    return f"{kind}{_range(schema)}"


def _range(schema: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{word} {_number(schema[key])}" for key, word in words.items() if key in schema]
    if "maxLength" in schema:
        found.append(f"at most {schema['maxLength']} characters")
    if schema.get("minLength") == 1 and "maxLength" not in schema:
        found.append("not empty")
    if "pattern" in schema:
        found.append(_code(schema["pattern"], quote=False))
    if "maxProperties" in schema:
        found.append(f"at most {schema['maxProperties']} keys")
    return f" {', '.join(found)}" if found else ""


def _number(value: float) -> str:
    if value == 2**64:
        return "2⁶⁴"
    return f"{int(value):,}" if value == int(value) else str(value)


def _code(value: object, *, quote: bool = True) -> str:
    """A value as JSON, in backticks; None stands for nothing given."""
    if value is None:
        return "none"
    text = json.dumps(value, default=list) if quote and not isinstance(value, str) else str(value)
    return f"`{text}`".replace("|", "\\|")


def _link(test: str) -> str:
    """A test's file, linked, and its name."""
    file, _, name = test.partition("::")
    return f"[{Path(file).stem}](../../{file}) `{name.rpartition('::')[2]}`"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for path, text in ((PAGE, page()), (SETTINGS_PAGE, settings_page())):
        if "--print" in sys.argv:
            print(text)
        else:
            path.write_text(text, encoding="utf-8")
