"""The documents name what there is: rooms, commands, files."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from mlx_serving.cli.main import app
from mlx_serving.common.job.checks import UNSUPPORTED
from tests.support.paths import ROOT

PACKAGE = ROOT / "mlx_serving"
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "ops" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_map_of_the_house_has_every_room_and_no_other() -> None:
    told = re.findall(r"^\| `([\w/]+)/` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    rooms = sorted(str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("__init__.py"))
    assert sorted(told) == [room for room in rooms if room != "."]


def test_every_script_is_in_the_life_of_a_job() -> None:
    text = ARCHITECTURE.read_text()
    scripts = sorted((PACKAGE / "common" / "lua").glob("*.lua"))
    assert [path.name for path in scripts if path.name not in text] == []


def test_every_command_is_in_the_command_lines_page() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    commands = getattr(get_command(app), "commands", {})
    assert len(commands) == 10
    assert [name for name in commands if f"| `{name}" not in text] == []


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
