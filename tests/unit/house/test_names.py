"""One word for one thing, and plain words: names, docstrings and comments of the package."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sources import Module, modules

if TYPE_CHECKING:
    from collections.abc import Iterator

# -- one name, one class ----------------------------------------------------------------


def types_of(module: Module) -> Iterator[str]:
    """Public classes and names of types (`Lane = Literal[...]`) that a module defines."""
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = target.id if isinstance(target, ast.Name) else ""
        else:
            continue
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
            yield name


def public_types() -> dict[str, list[str]]:
    """Modules that define a type of each public name."""
    found = defaultdict(list)
    for module in modules().values():
        for name in types_of(module):
            found[name].append(module.name)
    return found


def test_no_two_public_types_share_a_name() -> None:
    assert {name: where for name, where in public_types().items() if len(where) > 1} == {}


def test_the_rule_sees_classes_and_names_of_types() -> None:
    lines = ("class Row: ...", "Lane = Literal['bulk']", "Job: TypeAlias = dict", "_Own = int")
    module = Module("x", Path("x.py"), ast.parse("\n".join((*lines, "T = 1", "MAX = 2"))))
    assert [*types_of(module)] == ["Row", "Lane", "Job"]


# -- retired words ----------------------------------------------------------------------

RETIRED = {
    "aside": "in_thread",
    "board": "status",
    "company": "max_unproven",
    "manifest": "inflight_file",
    "measures": "counters",
    "nobodys": "padding_block",
    "residency": "model_budget",
    "residents": "loaded_models",
    "strays": "orphaned_claims",
    "vitals": "status",
}
"""Private words that the field has another one for, and that one."""


def names_in(tree: ast.AST) -> Iterator[str]:
    """Names that code defines or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def words_of(name: str) -> list[str]:
    """`HeldRows` and `held_rows` as their words, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def retired_names(module: Module) -> set[str]:
    names = {*names_in(module.tree), *module.name.split(".")[1:]}
    return {name for name in names if RETIRED.keys() & set(words_of(name))}


def test_names_use_the_glossarys_words() -> None:
    found = {module.name: sorted(retired_names(module)) for module in modules().values()}
    assert {name: retired for name, retired in found.items() if retired} == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HeldRows", ["held", "rows"]),
        ("_max_unproven", ["max", "unproven"]),
        ("KVCache", ["kv", "cache"]),
        ("IN_FLIGHT", ["in", "flight"]),
    ],
)
def test_a_name_is_read_as_its_words(name: str, words: list[str]) -> None:
    assert words_of(name) == words


# -- "where" is a place -----------------------------------------------------------------

_OUTCOME = r"None|True|False|empty|infinite|nothing|[01]|''|[Rr]aises?|[A-Z][a-z]+[A-Z]\w*|\w+ed"
_CLAUSE = (
    r"(?:there|nothing|no|none|not|another|neither|either|Redis)\b"
    r"|(?:it|that|this|they|one) "
    r"(?:is|isn't|are|was|were|has|had|does|doesn't|did|can|can't|will)\b"
)
CONDITION = re.compile(rf"\b(?:{_OUTCOME})[,:]? where\b|\b[Ww]here (?:{_CLAUSE})")
PLACE = re.compile(
    r"\b(?:from|to|of|and|or|know|knows|say|says|show|shows|tell|tells|is)$", re.IGNORECASE
)


def prose_of(module: Module) -> Iterator[str]:
    """Docstrings and comments, on one line each."""
    text = module.path.read_text()
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield " ".join(node.value.value.split())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def conditions_in(prose: str) -> list[str]:
    """Pieces of text in which "where" stands for "if", as far as a pattern can tell."""
    return [
        prose[max(0, match.start() - 20) : match.end() + 30]
        for match in CONDITION.finditer(prose)
        if not PLACE.search(prose[: match.start()].rstrip())
    ]


def test_where_means_a_place() -> None:
    found = {
        module.name: [piece for prose in prose_of(module) for piece in conditions_in(prose)]
        for module in modules().values()
    }
    assert {name: pieces for name, pieces in found.items() if pieces} == {}


@pytest.mark.parametrize(
    "prose",
    [
        "Return the job, None where there is none.",
        "Raises CorruptEvent where it isn't.",
        "Wait for it where no row decodes.",
        "Where nothing is left, end it.",
        "The record, empty where the job has a prompt.",
        "Loaded where the budget allows.",
    ],
)
def test_the_rule_sees_where_for_if(prose: str) -> None:
    assert conditions_in(prose)


@pytest.mark.parametrize(
    "prose",
    [
        "Where a job stands, as its control hash says.",
        "Its number, its bytes, and where they are.",
        "Reads from where it was.",
        "Where the state and the results go.",
        "It knows where it is.",
        "Show where it is.",
        "The folder where results are kept.",
    ],
)
def test_the_rule_lets_places_be(prose: str) -> None:
    assert conditions_in(prose) == []
