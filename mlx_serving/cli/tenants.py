"""`mlx-serving tenants`: what each tenant may have queued (jobs) and running (rows)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlx_serving.cli.console import print_json, print_table
from mlx_serving.cli.options import AsJson, ForModel, RedisUrlOption, read_settings

if TYPE_CHECKING:
    from mlx_serving.common.tenancy import Tenancy

app = typer.Typer(
    no_args_is_help=True,
    help="Limits on tenants: how many jobs each may have queued, how many rows of the batch it may "
    "run. A job takes a row for each choice (n).",
)

Limit = Annotated[
    str | None,
    typer.Option(help="A number from 0; none: no limit; default: the limit of all.", metavar="N"),
]


@app.command("list")
def list_(
    as_json: AsJson = False, model: ForModel = None, redis_url: RedisUrlOption = None
) -> None:
    """List the tenants that have jobs or limits."""
    with _tenancy(redis_url, model) as tenancy:
        view = tenancy.view()
    if as_json:
        print_json(view)
        return
    rows: list[tuple[object, ...]] = [
        (t.tenant, t.queued, _shown(t.queued_limit), t.running, _shown(t.running_limit))
        for t in view.tenants
    ]
    rows.append(("(all others)", "", _shown(view.queued), "", _shown(view.running)))
    print_table(("tenant", "queued jobs", "of", "running rows", "of"), rows)


@app.command("set")
def set_(
    tenant: Annotated[str | None, typer.Argument(help="Whose limits.")] = None,
    for_all: Annotated[
        bool, typer.Option("--all", help="Of every tenant without a limit of its own.")
    ] = False,
    queued: Limit = None,
    running: Limit = None,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Set limits. They hold from now on; what is queued or runs beyond them stays."""
    if (tenant is None) != for_all:
        raise typer.BadParameter("give a tenant, or --all")
    given = {"queued": queued, "running": running}
    limits = {kind: _number(value) for kind, value in given.items() if value is not None}
    with _tenancy(redis_url, model) as tenancy:
        tenancy.limit(tenant, limits)


def _tenancy(redis_url: str | None, model: str | None) -> Tenancy:
    from mlx_serving.common.redis.connection import resolve
    from mlx_serving.common.tenancy import Tenancy

    return Tenancy(resolve(read_settings(redis_url), model))


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() and text.isascii() else text


def _shown(limit: int | None) -> object:
    return "-" if limit is None else limit
