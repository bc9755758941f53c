"""The rules of the house, held by reading the source."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mlx_serving
from tests.support.paths import ROOT
from tests.support.sources import PACKAGE, Module, modules

MAX_FILE_LINES = 450
MEDIAN_FILE_LINES = 150
MAX_FUNCTION_LINES = 50
MEDIAN_FUNCTION_LINES = 10

STARTS_INTERPRETERS = "mlx_serving.common.interpreter"
SCORES_BY_MLX_LM = "mlx_serving.tally.evaluate"


def _nodes_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes_run(node)


def under(*packages: str) -> list[Module]:
    prefixes = [f"mlx_serving.{package}" for package in packages]
    return [module for module in modules().values() if _within(module.name, prefixes)]


def _within(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def breaches(of: list[Module], forbidden: list[str], *, allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{module.name} imports {name}"
        for module in of
        if not _within(module.name, [f"mlx_serving.{room}" for room in allowed])
        for name in sorted(module.imports())
        if _within(name, forbidden)
    ]


# -- who may import whom ----------------------------------------------------------------


def test_common_imports_neither_producer_nor_worker() -> None:
    others = ["producer", "worker", "cli", "tally"]
    assert breaches(under("common"), [f"mlx_serving.{name}" for name in others]) == []


def test_producer_never_imports_worker() -> None:
    assert breaches(under("producer"), ["mlx_serving.worker", "mlx_serving.cli"]) == []


def test_worker_never_imports_producer() -> None:
    assert breaches(under("worker"), ["mlx_serving.producer", "mlx_serving.cli"]) == []


def test_engine_imports_neither_redis_nor_rq() -> None:
    assert (
        breaches(under("worker.engine"), ["redis", "rq", "mlx_serving.common.redis.connection"])
        == []
    )


def test_mlx_stays_with_the_engine_and_the_training() -> None:
    rooms = ("worker", "tally.train", "tally.training", "tally.evaluate")
    libraries = ["mlx", "mlx_lm", "transformers"]
    assert breaches(list(modules().values()), libraries, allowed=rooms) == []


def test_one_module_of_the_worker_touches_rq() -> None:
    found = {breach.split()[0] for breach in breaches(under("worker"), ["rq"])}
    assert found <= {"mlx_serving.worker.rq_worker"}


def _imports_of_ours(module: Module) -> set[str]:
    """Modules of ours that one imports anywhere: at the top, in functions, for the type checker.

    A module also imports the packages that it lies in, since Python runs their `__init__` first.
    `mlx_serving` itself counts only if it is named: it imports public names on first use.
    """
    known, parts = modules(), module.name.split(".")
    around = {".".join(parts[:size]) for size in range(2, len(parts))}
    named = {name for name in module.imports() if name in known}
    return ((named - {"mlx_serving"}) | around | _root_names(module)) - {module.name}


def _root_names(module: Module) -> set[str]:
    """`mlx_serving` if a module imports one of its public names, as `Client`."""
    names = {name.removeprefix("mlx_serving.") for name in module.imports()}
    return {"mlx_serving"} if names & set(mlx_serving.__all__) else set()


def import_cycles(imports: dict[str, set[str]]) -> list[str]:
    """Find cycles until none is left, with one import of each taken away."""
    left = {name: set(imported) for name, imported in imports.items()}
    found = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            cycle = error.args[1][::-1]  # each imports the next one
            found.append(" -> ".join(cycle))
            left[cycle[0]].discard(cycle[1])
        else:
            return sorted(found)


def test_modules_import_in_no_cycle() -> None:
    """Of any kind: imports in functions and under `TYPE_CHECKING` tie modules together too."""
    assert import_cycles({m.name: _imports_of_ours(m) for m in modules().values()}) == []


def test_the_rule_sees_each_cycle_of_imports() -> None:
    imports = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    cycles = import_cycles(imports)
    assert [set(cycle.split(" -> ")) for cycle in cycles] == [{"a", "b", "c"}, {"d", "e"}]


def test_the_rule_sees_imports_of_every_kind() -> None:
    lines = (
        "if TYPE_CHECKING:",
        "    import mlx_serving.common.errors",
        "def later():",
        "    from mlx_serving.common import events",
        "    from mlx_serving import Client",
    )
    module = Module("mlx_serving.cli.demo.x", Path("x.py"), ast.parse("\n".join(lines)))
    assert _imports_of_ours(module) == {
        "mlx_serving", "mlx_serving.cli", "mlx_serving.cli.demo", "mlx_serving.common",
        "mlx_serving.common.errors", "mlx_serving.common.events",
    }  # fmt: skip


# -- who may spell and read what --------------------------------------------------------


def _string_constants(module: Module) -> Iterator[str]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    yield from (
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    )


def test_only_keys_spells_keys_and_channels() -> None:
    ours = r"(^|:)(job|ev|ch|open|wake|ctl|worker|leases|deadlines):"
    rqs = r"^(rq|mlxs):"
    keyish = re.compile(rf"{ours}|{rqs}")
    found = [
        f"{module.name}: {text!r}"
        for module in modules().values()
        if module.name not in {"mlx_serving.common.protocol.keys", "mlx_serving.common.settings"}
        for text in _string_constants(module)
        if keyish.search(text) and " " not in text
    ]
    assert found == []


def _reads_environment(module: Module) -> bool:
    attributes = {"environ", "getenv", "environb"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in attributes)
        or (isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & attributes)
        for node in ast.walk(module.tree)
    )


def test_only_settings_read_the_environment() -> None:
    """The module that starts interpreters writes one variable."""
    readers = {module.name for module in modules().values() if _reads_environment(module)}
    assert readers <= {"mlx_serving.common.settings", STARTS_INTERPRETERS}


def test_nothing_forks() -> None:
    forks = re.compile(r"\bos\.(fork|forkpty)\b|start_method\(\s*[\"']fork|context\(\s*[\"']fork")
    found = [module.name for module in modules().values() if forks.search(module.path.read_text())]
    assert found == []


def test_the_wired_limit_is_left_alone() -> None:
    """Raised, it makes macOS panic; mlx-lm's own loops raise it (ml-explore/mlx#3186).

    The score of the demo's model is the one exemption: it is there to have mlx-lm's answers, is a
    process of its own that somebody starts by hand, and no worker imports it. It does raise it.
    """
    raising = re.compile(
        r"\b(\w+_)?wired_limit\(|import .*wired_limit|generate_step"
        r"|BatchGenerator|\bmlx_lm\b.*\b(\w*generate|tuner|server)\b"
    )
    found = {
        module.name for module in modules().values() if raising.search(module.path.read_text())
    }
    assert found == {SCORES_BY_MLX_LM}
    importers = {m.name for m in modules().values() if SCORES_BY_MLX_LM in m.imports()}
    assert importers == {"mlx_serving.tally.training"}


def test_one_module_syncs_files() -> None:
    """Elsewhere a call would leave the data in a Mac's drive cache."""
    syncing = re.compile(r"\bos\.f?(data)?sync\b|import .*\bf(data)?sync\b|F_\w*FSYNC")
    found = {
        module.name for module in modules().values() if syncing.search(module.path.read_text())
    }
    assert found == {"mlx_serving.common.durable"}


def test_processes_are_spawned_by_name() -> None:
    """`multiprocessing.Process` takes the platform's start method, which forks on Linux."""
    bare = re.compile(r"\b(multiprocessing|mp)\.(Process|Pool|Queue|Manager)\(")
    found = [module.name for module in modules().values() if bare.search(module.path.read_text())]
    assert found == []


# What starts a process that may be Python, wherever it is looked up; and the words for Python.
_STARTERS = re.compile(
    r"(os\.)?(exec[lv]\w*|spawn[lv]\w*|posix_spawnp?|popen)|os\.system|pty\.spawn"
    r"|(\w+\.)*(create_subprocess_\w+|subprocess_(exec|shell)|ProcessPoolExecutor)"
    r"|(sys\.)?(executable|_base_executable)|(sys\.)?orig_argv"
)
_PYTHON = re.compile(r"(.*/)?(python|pypy)[\d.]*w?( .*)?")
_PROCESS_MODULES = ["multiprocessing", "concurrent.futures.process"]


def interpreter_starts(module: Module) -> list[str]:
    """Names and words in a module by which it may start an interpreter, or a process as one."""
    nodes = list(_nodes_run(module.tree))
    imported = {name for node in nodes for name in module.imported_by(node)}
    found = [name for name in imported if _within(name, _PROCESS_MODULES)]
    looked_up = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    found += [name for name in looked_up if _STARTERS.fullmatch(name)]
    found += [name for name in imported if _STARTERS.fullmatch(name)]
    subprocesses = {"subprocess", "os", "asyncio"} & {name.split(".")[0] for name in imported}
    words = _string_constants(module) if subprocesses else ()
    return sorted({*found, *(word for word in words if _PYTHON.fullmatch(word))})


def test_one_module_starts_interpreters() -> None:
    """Its interpreters import no code from the current folder; a bare `python -m` does."""
    others = [module for module in modules().values() if module.name != STARTS_INTERPRETERS]
    assert {each.name: found for each in others if (found := interpreter_starts(each))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import sys, subprocess\nsubprocess.run([sys.executable, '-m', 'x'])",
        "from sys import executable",
        "import subprocess\nsubprocess.run(['python3', '-c', 'x'])",
        "import subprocess\nsubprocess.Popen('/usr/bin/python3.12 -m x', shell=True)",
        "import multiprocessing\nmultiprocessing.get_context('spawn')",
        "def later():\n    from multiprocessing import Process",
        "import multiprocessing.pool",
        "from multiprocessing.context import SpawnContext",
        "from concurrent.futures import ProcessPoolExecutor",
        "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()",
        "import asyncio\nasyncio.create_subprocess_exec('x')",
        "import os\nos.execv('x', ['x'])",
        "import os\nos.posix_spawn('x', ['x'], {})",
        "import os\nos.system('x')",
        "from os import spawnlp",
    ],
)
def test_the_rule_sees_an_interpreter_started_elsewhere(source: str) -> None:
    assert interpreter_starts(Module("mlx_serving.x", Path("x.py"), ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from multiprocessing.pool import Pool",
        "import subprocess\nsubprocess.run(['vm_stat'])",
        "import os\nmarker = 'pythonic'",
        "engine.execute(model.system)",
    ],
)
def test_the_rule_lets_the_rest_be(source: str) -> None:
    assert interpreter_starts(Module("mlx_serving.x", Path("x.py"), ast.parse(source))) == []


# -- sizes ------------------------------------------------------------------------------


def _function_lines() -> Iterator[tuple[str, int]]:
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{module.name}.{node.name}", lines


def test_files_are_short() -> None:
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.lua"), *(ROOT / "native").rglob("*.?pp")]
    sources += [path for part in ("tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    lines = {str(path): len(path.read_text().splitlines()) for path in sources}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}
    assert statistics.median(lines.values()) <= MEDIAN_FILE_LINES


def test_functions_are_short() -> None:
    lines = list(_function_lines())
    assert [(name, count) for name, count in lines if count > MAX_FUNCTION_LINES] == []
    assert statistics.median(count for _, count in lines) <= MEDIAN_FUNCTION_LINES


# -- what an import brings along --------------------------------------------------------


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "from mlx_serving import Client, AsyncClient, GenerationJob",
        "import mlx_serving.cli.main",
        "import mlx_serving.tally.tasks",
    ],
)
def test_a_base_install_needs_no_engine(statement: str) -> None:
    heavy = "{'mlx', 'mlx_lm', 'transformers', 'numpy', 'mlx_serving.worker'}"
    assert _run(f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_version_is_said_once() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    assert version is not None
    assert _run("import mlx_serving; print(mlx_serving.__version__)") == version[1]
