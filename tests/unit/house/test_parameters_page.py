"""The two pages are what the schemas say; the tests that they name exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.job.checks import UNSUPPORTED
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.settings import Settings, setting_paths
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

NEAR = 3  # from a test to a helper of its file, to what that uses


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "parameters_page", ROOT / "scripts" / "parameters_page.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_schema_says() -> None:
    written = (ROOT / "docs" / "reference" / "parameters.md").read_text(encoding="utf-8")
    assert written == script().page(), "run scripts/parameters_page.py"


def test_the_settings_page_has_every_setting_and_its_meaning() -> None:
    written = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert written == script().settings_page(), "run scripts/parameters_page.py"
    assert re.findall(r"^## `\[(\w+)\]`$", written, re.MULTILINE) == list(Settings.model_fields)
    for *table, name in setting_paths():
        assert f"| `{name}` | " in written or not table
    assert script().TABLE_PAGES.keys() <= Settings.model_fields.keys()


def test_every_field_has_a_meaning_and_a_test() -> None:
    assert list(script().SHOWN_BY) == list(GenerationJob.model_fields)
    for name, field in GenerationJob.model_fields.items():
        assert field.description, name
    described = GenerationJob.model_json_schema()["properties"]
    assert all(schema.get("description") for schema in described.values())


def test_no_text_parameter_is_refused() -> None:
    assert [line.field for line in UNSUPPORTED] == ["kind", "adapter"]


@pytest.mark.parametrize("field", GenerationJob.model_fields)
def test_the_test_that_a_field_names_is_there_and_uses_it(field: str) -> None:
    file, *path = script().SHOWN_BY[field].split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    told = list(sources(tree, find(tree, path)))
    words = rf"""(?<![\w.]){field}\b(?==|["'])|["'\]]{field}["'\[]|\.{field}\b|\{{{field}\}}"""
    assert any(re.search(words, text) for text in told), f"{file} does not use {field}"


def find(tree: ast.Module, path: list[str]) -> ast.stmt:
    """The function that a node id names, within its class."""
    found: Any = tree
    for name in path:
        (found,) = [one for one in found.body if getattr(one, "name", None) == name]
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    return found


def sources(tree: ast.Module, test: ast.stmt) -> Iterator[str]:
    """The test's text with its decorators, then what it uses of its own file."""
    named = {name: one for one in tree.body for name in names(one)}
    seen: set[ast.stmt] = {test}
    edge = [test]
    for _ in range(NEAR):
        yield from (without_docstring(one) for one in edge)
        used = {n.id for one in edge for n in ast.walk(one) if isinstance(n, ast.Name)}
        edge = [named[name] for name in sorted(used & named.keys()) if named[name] not in seen]
        seen |= set(edge)


def names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign):
        return [statement.target.id] if isinstance(statement.target, ast.Name) else []
    if isinstance(statement, ast.Assign):
        return [one.id for one in statement.targets if isinstance(one, ast.Name)]
    return []


def without_docstring(statement: ast.stmt) -> str:
    """Code alone: a mention in a comment or a docstring shows nothing."""
    text = ast.unparse(statement)
    docstring = (
        ast.get_docstring(statement, clean=False)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        else None
    )
    return text.replace(docstring, "") if docstring else text
