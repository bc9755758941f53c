"""Every regular expression of the package is bounded: no input makes one take long (ReDoS).

Python's `re` backtracks: `(a+)+b` takes 4.6 s on 27 characters. Patterns of pydantic fields run
on Rust's regex, which is linear; they are held to the same rule, so that nobody has to know.
"""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

import pytest

import mlx_serving

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(mlx_serving.__file__).parent
# Regexes of how models write tool calls, matched where `names`, `plain` and `null` are asked.
FORMS = {
    "worker/engine/structured/tool_grammars/parameters.py",
    "worker/engine/structured/tool_grammars/schema.py",
    "worker/engine/structured/grammar.py",
}
FORM_FIELDS = {"names", "plain", "null", "nullable_null"}
CALLS = {"compile", "match", "search", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
REPEATS = {codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT}
HOSTILE_CHARS = 20_000
SEARCHED_CHARS = (
    2_000  # a search that begins anywhere may be quadratic: none is run on a job's text
)
LIMIT_SECONDS = 0.5


def patterns() -> Iterator[tuple[str, str | None]]:
    """Where a regex is used, and its text; None where it is put together at run time."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                for argument in _regex_arguments(node):
                    yield f"{file.relative_to(PACKAGE)}:{argument.lineno}", _text(argument)


def _text(argument: ast.expr) -> str | None:
    """What a literal or a name of `CONSTANTS` stands for."""
    match argument:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return CONSTANTS.get(name)
    return None


def _constants() -> dict[str, str]:
    """Texts that modules give a name, by that name in capitals."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


CONSTANTS = _constants()


def _regex_arguments(call: ast.Call) -> Iterator[ast.expr]:
    function = call.func
    if (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and (function.value.id, function.attr in CALLS) == ("re", True)
    ):
        yield call.args[0]
    for keyword in call.keywords:
        if keyword.arg == "pattern" or (keyword.arg in FORM_FIELDS and _text(keyword.value)):
            yield keyword.value


LITERALS = {where: text for where, text in patterns() if text is not None}
BUILT = {where for where, text in patterns() if text is None}


def depth_of_repeats(tree: Any) -> int:
    """Deepest nesting of repeats that can each run often."""
    deepest = 0
    for operation, argument in tree:
        inner = max(map(depth_of_repeats, _children(operation, argument)), default=0)
        often = operation in REPEATS and argument[1] > 1
        deepest = max(deepest, inner + often)
    return deepest


def _children(operation: Any, argument: Any) -> Iterator[Any]:
    if operation in REPEATS:
        yield argument[2]
    elif operation is codes.SUBPATTERN:
        yield argument[3]
    elif operation is codes.BRANCH:
        yield from argument[1]
    elif operation in {codes.ASSERT, codes.ASSERT_NOT}:
        yield argument[1]
    elif operation is codes.ATOMIC_GROUP:
        yield argument


def test_all_are_found() -> None:
    """The package's own are known: a new one is looked at, here."""
    assert len(LITERALS) >= 10
    assert {where.partition(":")[0] for where in BUILT} <= {"tally/tokenizer.py", *FORMS}


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|b*)*", "(?:x{1,9})+", "((a+b)c)*"])
def test_the_check_finds_what_it_is_for(pattern: str) -> None:
    assert depth_of_repeats(parser.parse(pattern)) > 1


@pytest.mark.parametrize("where", LITERALS)
def test_no_repeat_is_inside_another(where: str) -> None:
    assert depth_of_repeats(parser.parse(LITERALS[where])) <= 1


ALPHABETS = ["a", "A1", "0", " ", "-", "_a", "\n", "<0x", ":", "a:1", "é", "\0", "00-"]


@pytest.mark.parametrize("where", LITERALS)
def test_no_hostile_text_takes_long(where: str) -> None:
    compiled = re.compile(LITERALS[where])
    for alphabet in ALPHABETS:
        text = alphabet * (HOSTILE_CHARS // len(alphabet)) + "!"
        started = time.perf_counter()
        compiled.fullmatch(text)
        compiled.search(text[-SEARCHED_CHARS:])
        assert time.perf_counter() - started < LIMIT_SECONDS, (where, alphabet)


def test_no_model_asks_pydantic_for_pythons_engine() -> None:
    assert not [file.name for file in PACKAGE.rglob("*.py") if "python-re" in file.read_text()]
