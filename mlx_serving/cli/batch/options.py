"""Options of `mlx-serving batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Name = Annotated[
    str | None,
    typer.Argument(help="Id, folder or input file of a batch; without it, the last one."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file; without it, stdout.")
]
Requests = Annotated[str, typer.Argument(help="Requests, one a line; - reads standard input.")]
LineModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Model of lines that name none.")
]
ModelMap = Annotated[
    list[str] | None,
    typer.Option(help="FOREIGN=OURS: what a line calls FOREIGN runs on OURS. Repeatable."),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens to decode, for lines that do not say.")
]
Temperature = Annotated[float | None, typer.Option(help="Temperature, for lines that do not say.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Plain prompts go on as they are: no chat template.")
]
Order = Annotated[
    Literal["prefix", "file"],
    typer.Option(help="prefix: lines that begin alike follow each other. file: as they stand."),
]
CompletionWindow = Annotated[
    str, typer.Option(help="After so long (24h, 90m, 2d) what has not finished expires.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Run nothing where any line is wrong.")]
Depth = Annotated[int, typer.Option(help="Lines of a model to keep waiting in its queue.")]
InFlight = Annotated[int, typer.Option(help="Most lines of a model in Redis at once.")]
Tenant = Annotated[
    str | None, typer.Option(help="Whose jobs they are: its limits and its share hold.")
]
Folder = Annotated[
    Path | None, typer.Option(help="Where state and results go; else beside the file.")
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Watch it to its end; Ctrl-C leaves it running.")
]
Foreground = Annotated[
    bool, typer.Option("--foreground", help="Run it in this process, for service managers.")
]


def model_map(texts: list[str] | None) -> dict[str, str]:
    """Read FOREIGN=OURS pairs. Raises typer.BadParameter."""
    pairs = [(text, *text.partition("=")) for text in texts or []]
    for text, foreign, _, ours in pairs:
        if not (foreign and ours):
            raise typer.BadParameter(f"--model-map takes FOREIGN=OURS, not {text!r}")
    return {foreign: ours for _, foreign, _, ours in pairs}
