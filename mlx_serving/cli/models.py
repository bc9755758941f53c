"""`mlx-serving models`: which aliases there are, and which this machine can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from mlx_serving.cli.console import print_json, print_table
from mlx_serving.cli.hub_models import found_path, hub_problem, known_path, pull
from mlx_serving.cli.options import AsJson, read_settings

BYTES_A_MB: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelView:
    """One alias; `problem` says why it can't be loaded here.

    `size_bytes` counts its files, `weight_bytes` what is loaded of them: that counts for
    `model_budget_bytes`.
    """

    alias: str
    path: str
    revision: str | None = None
    size_bytes: int | None = None
    weight_bytes: int | None = None
    problem: str | None = None


def models(
    as_json: AsJson = False,
    alias: Annotated[
        str | None, typer.Argument(help="Only this alias; or `pull`, to download one.")
    ] = None,
    pulled: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="What to pull.")] = None,
) -> None:
    """List the models of the settings, or download one. Reads their files, loads nothing."""
    settings = read_settings()
    if pulled is not None:
        if alias != "pull":
            raise typer.BadParameter("models takes one alias, or pull and one")
        pull(settings, pulled)
        alias = pulled
    shown = sorted(settings.models) if alias is None else [alias]
    views = [model_view(name, found_path(settings, known_path(settings, name))) for name in shown]
    if as_json:
        print_json(views)
    else:
        print_table(
            ("alias", "state", "revision", "size", "weights", "path"),
            [
                (
                    v.alias,
                    v.problem or "ready",
                    v.revision or "",
                    _mb(v.size_bytes),
                    _mb(v.weight_bytes),
                    v.path,
                )
                for v in views
            ],
        )


def model_view(alias: str, path: str) -> ModelView:
    """Look at one alias's files."""
    from mlx_serving.worker.engine.model_files import (
        ModelFilesError,
        check_model_files,
        model_revision,
        weight_bytes,
    )

    if (problem := hub_problem(alias, path)) is not None:
        return ModelView(alias, path, problem=problem)
    folder = Path(path)
    try:
        check_model_files(folder)
        revision = model_revision(folder)
    except (ModelFilesError, OSError) as error:
        return ModelView(alias, path, problem=str(error))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return ModelView(alias, path, revision, size, weight_bytes(folder))


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / BYTES_A_MB:.1f} MB"
