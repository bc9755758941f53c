"""The source files of the package, parsed once, for the tests of the house's rules."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = ROOT / "mlx_serving"


@dataclass(frozen=True)
class Module:
    """A source file, parsed once."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def imports(self) -> set[str]:
        """Dotted names imported, wherever in the module."""
        return {name for node in ast.walk(self.tree) for name in self.imported_by(node)}

    def imported_by(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.name.split(".")
                kept = parts[: len(parts) - node.level + self.is_package]
                base = ".".join([*kept, base] if base else kept)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Module]:
    found = sorted(PACKAGE.rglob("*.py"))
    return {
        name: Module(name, path, ast.parse(path.read_text(), str(path)))
        for path in found
        for name in [_module_name(path)]
    }
