"""Every command that a page or a docstring publishes is one that its benchmark takes; each runs."""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each benchmark with the least that its command takes: does it run, not what does it say.
SMALLEST = {
    "contract.lanes": "--rows 4 --bulk-tokens 8 --tokens 4 --seconds 0.5",
    "studies.affinity_claims": "",
    "studies.job_bytes": "--rate 1000",
    "studies.detokenizer": "",
    "studies.grouping": "--model tiny --lines 40 --prefix 64 --rows 8 --cases 2",
    "studies.job_cost": "--jobs 32 --rounds 1",
    "studies.model_load": "--shape tiny --streams 2",
    "studies.models": "--workers 1 --seconds 2 --jobs-a-second 8 --load-seconds 0.1 --rate 400",
    "studies.publishing": "--rows 4 --steps 20",
    "studies.sampler": "--rows 4 --vocabulary 1000 --calls 2 --rounds 1",
    "studies.structured": "--batch 2 --steps 2 --dtype float32",
    "studies.tenants": "--queued 100 --claims 2",
}
# Run by other files, most of them as parts of `python -m benchmarks --quick`.
RUN_ELSEWHERE = {
    "test_benchmarks_engine": {"contract.engine"},
    "test_benchmarks_smoke": {
        "contract.dispatch", "contract.latency", "contract.streaming", "peers.churn",
        "peers.streams", "studies.ragged", "studies.timeline",
    },
    "test_scale_smoke": {"contract.scale", "studies.capacity", "studies.redis_ceiling"},
}  # fmt: skip
# Only their arguments are read: each computes for a minute on a CPU, however small it is asked for.
TOO_LONG = {"contract.soak", "studies.affinity", "studies.prefix"}
PLACES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/**/*.py", "examples/**/*.py")
COMMAND = re.compile(r"python -m (benchmarks[\w.]*)((?:[ ]+[\w./,\-\[\]]+)*)")


class Parsed(Exception):  # noqa: N818 -- no error: the arguments are right
    """What stands for the benchmark's work once its arguments were read."""


def published() -> set[tuple[str, str]]:
    """Modules and arguments of all commands in pages and docstrings."""
    texts = [path.read_text() for place in PLACES for path in sorted(ROOT.glob(place))]
    found = set()
    for text in texts:
        for module, words in COMMAND.findall(re.sub(r"\\\n\s*", " ", text)):
            found.add((module, " ".join(words.translate(str.maketrans("", "", "[]")).split())))
    return found


def scripts() -> set[str]:
    """Benchmarks that can be run by themselves, by their names within `benchmarks`."""
    folder = ROOT / "benchmarks"
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for room in ("contract", "peers", "studies")
        for path in (folder / room).glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }


def start(monkeypatch: pytest.MonkeyPatch, module: str, words: Sequence[str]) -> None:
    """What `python -m` does; in this process, which has imported MLX."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    name = f"{module}.__main__" if module == "benchmarks" else module
    vars(import_module(name))["main"]()


@pytest.mark.parametrize(("module", "words"), sorted(published()))
def test_a_published_command_is_taken(
    monkeypatch: pytest.MonkeyPatch, module: str, words: str
) -> None:
    """Its module is there, and reads these arguments. Without any there is nothing to read."""
    if not words:
        assert module == "benchmarks" or module.removeprefix("benchmarks.") in scripts()
        return
    read = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *rest: Any) -> None:
        read(parser, *rest)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        start(monkeypatch, module, words.split())


def test_every_benchmark_is_published_and_run() -> None:
    assert {module for module, _ in published()} >= {f"benchmarks.{name}" for name in scripts()}
    assert scripts() == SMALLEST.keys() | TOO_LONG.union(*RUN_ELSEWHERE.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    start(monkeypatch, f"benchmarks.{name}", SMALLEST[name].split())
    assert re.search(r"\d", capsys.readouterr().out), "it says something"
