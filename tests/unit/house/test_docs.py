"""The documents name what there is: rooms, commands, files."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mlx_serving.cli.main import app
from mlx_serving.common.job.checks import UNSUPPORTED
from tests.support.paths import ROOT

PACKAGE = ROOT / "mlx_serving"
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "ops" / "README.md", *sorted(DOCS.rglob("*.md"))]
ARCHITECTURE = DOCS / "explanation" / "architecture.md"
EXPLANATIONS = sorted((DOCS / "explanation").glob("*.md"))
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
PARAGRAPH_WORDS = 90


def commands(text: str) -> list[str]:
    """Command lines of ours in a page's blocks, without settings before and pipes behind them."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in {"", "sh"}]
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    found = [
        re.search(r"(?:^|[\s=])(mlx-serving [a-z][^|>&]*)", line.removeprefix("$ "))
        for line in lines
    ]
    return [match[1].strip() for match in found if match]


COMMANDS = sorted({one for document in DOCUMENTS for one in commands(document.read_text())})


def test_the_map_of_the_house_has_every_room_and_no_other() -> None:
    told = re.findall(r"^\| `([\w/]+)/` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    rooms = sorted(str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("__init__.py"))
    assert sorted(told) == [room for room in rooms if room != "."]


def test_every_script_is_in_the_life_of_a_job() -> None:
    text = ARCHITECTURE.read_text()
    scripts = sorted((PACKAGE / "common" / "lua").glob("*.lua"))
    assert [path.name for path in scripts if path.name not in text] == []


def test_every_command_is_in_the_command_lines_page() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert text == script("cli_page").page(), "run scripts/cli_page.py"
    commands = getattr(get_command(app), "commands", {})
    assert len(commands) == 13
    assert [name for name in commands if f"| `{name}" not in text] == []


def script(name: str) -> ModuleType:
    """A module of `scripts/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_on_a_page_is_one(command: str) -> None:
    """`--help` stops it before it does anything, but after its options were read."""
    words = shlex.split(command)[1:]
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [*words, "--no-such-option", "--help"]).exit_code != 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text()):
        if "://" in target:
            continue
        page = (document.parent / target).resolve() if target else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "index.md"
    listed = {(DOCS / target).resolve() for target, _ in LINK.findall(index.read_text())}
    pages = {page for page in DOCS.rglob("*.md") if page.parent.name != "decisions"} - {index}
    assert sorted(str(page.relative_to(ROOT)) for page in pages - listed) == []


def test_the_list_of_decisions_has_each_of_them() -> None:
    listed = (DOCS / "decisions" / "README.md").read_text()
    decisions = sorted((DOCS / "decisions").glob("0*.md"))
    assert [path.name for path in decisions if f"({path.name})" not in listed] == []


@pytest.mark.parametrize("page", EXPLANATIONS, ids=lambda path: path.name)
def test_paragraphs_are_short(page: Path) -> None:
    """Tables and code are no paragraphs; each item of a list is one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#| {4}).*$", "", text, flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    assert [p[:60] for p in paragraphs if len(p.split()) > PARAGRAPH_WORDS] == []


def test_the_readme_says_what_is_refused() -> None:
    """By the field's own name, or, for penalties and adapters, by what they are."""
    section = (ROOT / "README.md").read_text().partition("## What it does not do yet")[2]
    named = {"top_logprobs": "logprobs", "adapter": "adapters"}
    named |= {f"{kind}_penalty": "penalties" for kind in ("repetition", "presence", "frequency")}
    fields = [named.get(row.field, f"`{row.field}`") for row in UNSUPPORTED]
    assert [field for field in fields if field not in section] == []
