"""The page on bulk files says what the code does."""

import re
import shlex
from inspect import getsource

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mlx_serving.cli.batch import app as batch
from mlx_serving.cli.main import app
from mlx_serving.producer.batch import collector, lines, validation
from mlx_serving.producer.batch.body import IGNORED, NEUTRAL
from mlx_serving.producer.batch.options import BatchOptions
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "how-to" / "bulk.md").read_text()
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines_ = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines_ if line.startswith("mlx-serving batch")]


@pytest.mark.parametrize("command", commands(PAGE) + commands(README))
def test_every_command_on_the_pages_is_one(command: str) -> None:
    """`--help` stops it before it does anything, but after its options were read."""
    words = shlex.split(command)[1:]
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [*words, "--no-such-option", "--help"]).exit_code != 0


def test_every_command_and_option_is_on_the_page() -> None:
    known = getattr(get_command(batch), "commands", {})
    assert [name for name in known if f"`{name}" not in PAGE] == []
    cli = (ROOT / "docs" / "reference" / "cli.md").read_text()
    options = [o for parameter in known["submit"].params for o in parameter.opts if "--" in o]
    missing = [o for o in options if f"`{o}" not in cli and o not in {"--json", "--redis-url"}]
    assert missing == []


def test_every_ignored_and_neutral_field_is_on_the_page() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| changes nothing")]
    assert set(re.findall(r"`(\w+)`", row)) == IGNORED
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| only in OpenAI's")]
    assert set(re.findall(r"`(\w+)`", row)) == set(NEUTRAL)


def test_every_code_of_an_error_line_is_on_the_page() -> None:
    code = re.compile(r'"((?:invalid|duplicate|too_many|line_too|batch_)\w*)"')
    sources = "".join(map(getsource, (lines, validation, collector)))
    found = set(code.findall(sources))
    assert len(found) >= 7
    assert [name for name in found if f"`{name}`" not in PAGE] == []


def test_the_defaults_are_as_written() -> None:
    options = BatchOptions()
    assert f"(`--depth`, {options.depth} a model)" in PAGE
    assert f"`--in-flight` ({options.in_flight} a" in PAGE
    assert f"`completion_window` (`{options.completion_window}`)" in PAGE
    assert "the first 64, 256 and 1,024 characters" in PAGE
