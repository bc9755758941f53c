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
DOCUMENTS = [ROOT / "README.md", ROOT / "ops" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
    told = re.findall(
        r"^\| `([\w/]+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
    rooms = sorted(str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("__init__.py"))
    assert sorted(told) == [room for room in rooms if room != "."]


def test_every_script_is_in_the_life_of_a_job() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    scripts = sorted((PACKAGE / "common" / "lua").glob("*.lua"))
    assert [path.name for path in scripts if path.name not in text] == []


def test_every_command_is_in_the_command_lines_page() -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert text == script("cli_page").page(), "run scripts/cli_page.py"
    commands = getattr(get_command(app), "commands", {})
    assert len(commands) == 10
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
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_readme_says_what_is_refused() -> None:
    """By the field's own name, or, for penalties and adapters, by what they are."""
    section = (ROOT / "README.md").read_text().partition("## What it does not do yet")[2]
    named = {"top_logprobs": "logprobs", "adapter": "adapters"}
    named |= {f"{kind}_penalty": "penalties" for kind in ("repetition", "presence", "frequency")}
    fields = [named.get(row.field, f"`{row.field}`") for row in UNSUPPORTED]
    assert [field for field in fields if field not in section] == []
