"""One list of names: what Python and the Lua scripts call the fields of our hashes and entries."""

from __future__ import annotations

import dataclasses
import re
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common import events
from mlx_serving.common.attempts import Attempt
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.fields import (
    EVENT_OPENING,
    TOKENS_OPENING,
    BatchField,
    EntryField,
    JobField,
    LimitField,
    lua_tables,
)
from mlx_serving.common.protocol.scripts import NAMES, script_text
from mlx_serving.common.protocol.stored_events import payloads
from mlx_serving.common.worker_record import WorkerRecord
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from enum import StrEnum
    from pathlib import Path

LUA = sorted((ROOT / "mlx_serving" / "common" / "lua").glob("*.lua"))
LUA_LOCALS = 200  # Lua's own limit of a function, which a script is
LISTS = re.compile(r"(?:field_list|attempt_fields)\(([^)]*)\)")
STORED = "|".join(JobField)
CALL = r"(?:hget|hmget|hset|hdel|hincrby)\([^)]*keys\.job\([^)]*\)"
SPELLED = re.compile(rf"{CALL}, *[\"'](?:{STORED})[\"']")


@pytest.mark.parametrize("fields", [JobField, EntryField, LimitField, BatchField])
def test_no_two_fields_are_stored_by_one_name(fields: type[StrEnum]) -> None:
    assert len(fields.__members__) == len(set(fields))


def test_the_lua_tables_name_every_field() -> None:
    text = lua_tables()
    for table, fields in {"F": JobField, "ENTRY": EntryField, "LIMIT": LimitField}.items():
        (body,) = re.findall(rf"^local {table} = {{(.*)}}$", text, re.MULTILINE)
        pairs = dict(re.findall(r"(\w+) = '(\w+)'", body))
        assert pairs == {field.name.lower(): field.value for field in fields}


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.stem)
def test_a_script_names_only_fields_that_there_are(path: Path) -> None:
    text = _code(path)
    named = set(re.findall(r"\bF\.(\w+)", text)) | _listed(text)
    assert named <= {field.name.lower() for field in JobField}
    assert set(re.findall(r"\bENTRY\.(\w+)", text)) <= {field.name.lower() for field in EntryField}
    assert set(re.findall(r"\bLIMIT\.(\w+)", text)) <= {field.name.lower() for field in LimitField}
    of_worker = {field.name for field in dataclasses.fields(WorkerRecord)}
    assert set(re.findall(r"\bWORKER\.(\w+)", text)) <= of_worker


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.stem)
def test_no_script_spells_a_stored_name(path: Path) -> None:
    spelled = set(re.findall(r"'(\w+)'", LISTS.sub("", _code(path))))
    same = {field.value for field in JobField if field.name.lower() == field.value}
    assert not spelled & ({field.value for field in chain(JobField, EntryField)} - same)


def test_no_module_spells_a_stored_name_of_the_control_hash() -> None:
    modules = (ROOT / "mlx_serving").rglob("*.py")
    assert not [str(path) for path in modules if SPELLED.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_fewer_locals_than_lua_allows(name: str) -> None:
    # A block that has ended holds none: Lua itself sees to what is in it.
    text = re.sub(r"^do\n.*?^end\n", "", script_text(name), flags=re.MULTILINE | re.DOTALL)
    declared = re.findall(r"^local (?:function \w+|([^=\n]+))", text, re.MULTILINE)
    assert sum(names.count(",") + 1 for names in declared) < LUA_LOCALS


def test_every_event_begins_with_the_opening() -> None:
    choices = [events.ChoiceDelta(0, "x", [1])]
    event = events.tokens_event(attempt=3, tag="0123abcd", seq=17, choices=choices)
    assert events.encode(event).startswith((EVENT_OPENING % (3, "0123abcd", 17)).encode())
    opening = events.opening(b"3", b"0123abcd", b"17")
    assert opening + events.body(event) == events.encode(event)


@pytest.mark.parametrize(
    ("choice", "form", "has_tokens"),
    [
        (events.ChoiceDelta(0, "x", [1]), EntryField.TOKENS, True),
        (events.ChoiceDelta(0, '"token_ids"'), EntryField.TOKENS, False),
        (events.ChoiceDelta(1, "x", [1]), EntryField.BODY, True),
    ],
)
def test_a_row_says_how_its_body_is_stored_and_whether_it_has_tokens(
    choice: events.ChoiceDelta, form: EntryField, *, has_tokens: bool
) -> None:
    event = events.tokens_event(attempt=1, tag="0f", seq=2, choices=[choice])
    row = calls.CommitRow.of(Attempt("a", 1, "0f"), event)
    assert row.has_tokens is has_tokens
    stored = events.body(event)
    if form is EntryField.TOKENS:
        stored = stored.removeprefix(TOKENS_OPENING.encode())
    entry = {EntryField.WRITER.encode(): b"1-0f", form.encode(): stored}
    assert payloads([(b"2-0", entry)]) == [events.encode(event)]


def _code(path: Path) -> str:
    """A script without its comments."""
    return re.sub(r"--.*", "", path.read_text(encoding="utf-8"))


def _listed(text: str) -> set[str]:
    """Names that a script gives to `field_list` and `attempt_fields`."""
    return set(re.findall(r"'(\w+)'", ",".join(LISTS.findall(text))))
