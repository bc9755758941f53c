"""docs/explanation/delivery.md names tests; each of them exists."""

import re

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/explanation/delivery.md").read_text()


def test_every_test_that_the_page_names_exists() -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    known = set(re.findall(r"(?:def|class) (test_\w+|Test[A-Z]\w+)", "\n".join(sources.values())))
    files = set(re.findall(r"(test_\w+\.py)", PAGE))
    named = set(re.findall(r"(?<![\w/])(test_\w+|Test[A-Z]\w+)(?![\w.*]|\.py)", PAGE))
    assert len(named) > 30
    assert files <= sources.keys()
    assert named <= known
