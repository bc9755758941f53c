"""The `doctor` command: runs all checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlx_serving.cli.console import EXIT_ERROR, print_json
from mlx_serving.cli.options import AsJson, RedisUrlOption, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.cli.doctor.report import Check
    from mlx_serving.common.settings import Settings


def doctor(
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model whose Redis and files to check.")
    ] = "tally",
    as_json: AsJson = False,
    redis_url: RedisUrlOption = None,
) -> None:
    """Check Redis, the engine and this machine. Exit status 1 if a check fails."""
    from mlx_serving.cli.doctor.report import failed, print_report

    checks = list(run_checks(read_settings(redis_url), model))
    if as_json:
        print_json(checks)
    else:
        print_report(checks)
    if failed(checks):
        raise typer.Exit(EXIT_ERROR)


def run_checks(settings: Settings, model: str) -> Iterator[Check]:
    """Run all checks; a group that fails does not stop the others."""
    from mlx_serving.cli.doctor.engine import engine_checks, fleet_checks, other_models
    from mlx_serving.cli.doctor.machine import condition_checks, mac_checks
    from mlx_serving.cli.doctor.redis_server import redis_checks
    from mlx_serving.common.redis.connection import resolve

    yield from redis_checks(resolve(settings, model))
    yield from engine_checks(settings, model)
    yield from other_models(settings, model)
    yield from fleet_checks(resolve(settings, model))
    yield from condition_checks(settings)
    yield from mac_checks()
