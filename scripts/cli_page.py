"""Writes docs/reference/cli.md: every command of the command line, with its options.

    python scripts/cli_page.py          # writes the page
    python scripts/cli_page.py --print  # shows it

Commands, options and their meaning come from `--help`. This file adds what concerns several
commands and what `doctor` checks. `tests/unit/house/test_docs.py` compares the page with this.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from typer.main import get_command

from mlx_serving.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
EVERYWHERE: Final = "--redis-url"  # said once, in the head

_HEAD: Final = """\
# The command line

```sh
mlx-serving generate --model tally "count from 3 to 12"    # 3 4 5 6 7 8 9 10 11 12
mlx-serving status                                         # queues and workers
mlx-serving top                                            # the same, live
```

[Settings](settings.md) come from the environment (`MLX_SERVING_…`) or `mlx-serving.toml`. All
commands but `demo` and `models` take `--redis-url`, which wins over both. Give a password in the
environment: a command line is no secret. As a module: `python -P -m mlx_serving` (without `-P`
Python imports from the current folder first). `generate`, `status`, `top`, `cancel`, `batch` and
`--help` import no MLX.

| exit status | |
|---|---|
| 0 | done |
| 1 | on stderr `error: <code>: <what is wrong>`; `io_error`: the system refuses a file |
| 2 | a wrong option |
| 130 | Ctrl-C |
| a worker's | [how a worker ends](../how-to/operations.md#how-a-worker-ends) |

This page is written by `python scripts/cli_page.py` from what `--help` says.
"""

_MORE: Final = {
    "demo": "A table on a terminal, lines elsewhere.",
    "worker": "[Several models](../explanation/models.md); [service files](../../ops/README.md).",
    "generate": """\
A job's own default temperature is 1.0. If nobody takes the job for 3 s, it says so. A signal
cancels the job and waits for its end, at most 5 s from when Redis has the cancel, so that
everything decoded is printed; if Redis does not answer, it tries for 10 s. A second Ctrl-C, or
another signal half a second after the first, does not wait for the end. A reader that goes away
(`| head`) cancels the job too. On a terminal, control characters in a model's text are shown as �,
so that no model can drive the terminal.""",
    "status": "Never shows a job's text.",
    "top": """\
Per worker: state with its reasons, rows, KV tokens reserved, tokens/s over the last 10 s, age of
its last lease renewal; on a wide terminal also device, memory and version. Per queue: jobs that
wait and run, and the age of the oldest that has not ended. The user `monitor` is enough.
[What to look for](../how-to/operations.md#the-fleet-live).""",
    "batch submit": """\
Prints the batch's id on stdout and what it found on stderr.
More: [bulk files](../how-to/bulk.md).""",
    "batch results": "The file is replaced as a whole; a pipe or a device is written to.",
    "tenants set": "More: [tenants](../how-to/tenants.md).",
    "models": "`pull` downloads a hub's model; of a branch, it says which commit to write.",
    "doctor": """\
| check | fails | warns |
|---|---|---|
| redis | no answer, or a refusal, by its [code](errors.md); older than 7.0; a Cluster; \
evicts keys; the protocol's scripts don't run | \
no AOF, or one that is not `always`; a ping over 5 ms; older than 7.0.15 |
| engine | | not installed: this machine can submit, not serve |
| mlx device | | a Linux CPU without OpenBLAS |
| native | | a twin in place of the native piece, with the reason |
| model | it does not load, or Tally's answer is wrong | |
| other models | | an alias whose files can't be loaded |
| fleet | | a live worker that could not load a model; jobs for a model that nobody serves |
| work | | a condition of the settings that this machine can't tell |
| mac | | sleep, low-power mode, unknown chip; *unverified*: never run on a Mac |""",
}
"""What a reader wants to know beside the help of a command."""


def page() -> str:
    """The page's text."""
    found = list(commands(get_command(app)))
    index = "".join(f"| `{name}` | {_summary(one)} |\n" for name, one in found)
    parts = [_HEAD, f"| command | does |\n|---|---|\n{index}"]
    return "\n".join([*parts, *(_section(name, one) for name, one in found)])


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 -- typer's command has no public type
    """Every command with its name as it is typed, in the order of `--help`."""
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))
        else:
            yield " ".join((*path, name)), one


def _summary(command: Any) -> str:  # noqa: ANN401 -- as above
    return str(command.help).partition("\n\n")[0].replace("\n", " ").rstrip(".")


def _section(name: str, command: Any) -> str:  # noqa: ANN401 -- as above
    hints = get_type_hints(inspect.unwrap(command.callback))
    shown = [one for one in command.params if EVERYWHERE not in one.opts]
    rows = [_row(one, get_args(hints.get(one.name))) for one in shown]
    table = f"| | | default |\n|---|---|---|\n{''.join(rows)}"
    parts = [f"## {name}", str(command.help), _MORE.get(name, ""), table if rows else ""]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _row(parameter: Any, choices: tuple[Any, ...]) -> str:  # noqa: ANN401 -- as above
    is_option = parameter.opts[0].startswith("-")
    spelled = parameter.opts if is_option else [parameter.name.upper()]
    default = parameter.default
    if parameter.required:
        shown = "needed"
    elif default is None or default is False:
        shown = ""
    else:
        shown = f"`{default}`"
    names = ", ".join(f"`{one}`" for one in spelled)
    words = ", ".join(f"`{one}`" for one in choices if isinstance(one, str))
    meaning = (parameter.help or "").rstrip(".") + (f" ({words})" if words else "")
    return f"| {names} | {meaning} | {shown} |\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")
