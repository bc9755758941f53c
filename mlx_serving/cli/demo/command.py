"""The `demo` command."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for the worker to come up, and for the jobs.")
    ] = 120.0,
) -> None:
    """Stream eight jobs side by side out of one batch, and check each answer.

    Starts a private redis-server and one worker, and ends both. Exit status 0 only with eight
    right answers.
    """
    from mlx_serving.cli.demo.run import run_demo

    raise typer.Exit(run_demo(timeout))
