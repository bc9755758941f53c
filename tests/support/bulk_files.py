"""Bulk files for tests: many lines, and whether what came back is all of it, once and right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.worker_process import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


def simulated_line(index: int) -> dict[str, Any]:
    """A line that the simulated engine answers with 1 2 3 …, as many as the line says."""
    body = {
        "model": "tally",
        "messages": [{"role": "user", "content": f"line {index}"}],
        "max_tokens": tokens_of(index),
        "user": "somebody",
    }
    url = "/v1/chat/completions"
    return {"custom_id": f"r-{index}", "method": "POST", "url": url, "body": body}


def tokens_of(index: int) -> int:
    return index % 7 + 1


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    with path.open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(line: dict[str, Any]) -> str:
    text: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return text


def check_simulated(lines: list[dict[str, Any]], expected: Iterable[int]) -> None:
    """Each expected line once, none missing, every text the one that its line asks for."""
    check(lines, expected, lambda index, text: text == counted(tokens_of(index)))


def check(
    lines: list[dict[str, Any]], expected: Iterable[int], right: Callable[[int, str], bool]
) -> None:
    found = [int(line["custom_id"].removeprefix("r-")) for line in lines]
    assert len(found) == len(set(found)), "an answer came twice"
    assert sorted(found) == sorted(expected)
    wrong = [line for i, line in zip(found, lines, strict=True) if not right(i, text_of(line))]
    assert wrong == []
