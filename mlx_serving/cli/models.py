"""`mlx-serving models`: lists the aliases with their files, and downloads models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mlx_serving.cli.console import note, print_json, print_table
from mlx_serving.cli.options import AsJson, read_settings
from mlx_serving.common.errors import FieldError, ModelUnreachable, UnknownModel

if TYPE_CHECKING:
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.model_files import ModelFilesError


def known_path(settings: Settings, model: str) -> str:
    """Folder or hub name that the settings have for a model, unchecked.

    Raises:
        UnknownModel: the settings have no such alias.

    """
    path = settings.models.get(model)
    if path is None:
        known = ", ".join(sorted(settings.models))
        reason = f"{model!r} is not an alias in the settings (known: {known})"
        raise UnknownModel([FieldError("model", reason)])
    return path


def found_path(path: str) -> str:
    """Local folder of a model, or its hub name if it is not downloaded; downloads nothing."""
    from mlx_serving.worker.engine.model_files import ModelFilesError
    from mlx_serving.worker.engine.model_hub import Hub, hub_model, local_folder

    model = hub_model(path)
    if model is None:
        return path
    try:
        found = local_folder(model, Hub())
    except ModelFilesError:
        return path  # the check of its files says why
    return path if found is None else str(found)


def hub_problem(alias: str, path: str) -> str | None:
    """Why `found_path` found no folder of a hub's model; None if the path is a folder."""
    from mlx_serving.worker.engine.model_files import ModelFilesError
    from mlx_serving.worker.engine.model_hub import hub_model, require_pinned

    model = hub_model(path)
    if model is None:
        return None
    try:
        require_pinned(model)
    except ModelFilesError as error:
        return str(error)
    return f"not downloaded, or not completely: mlx-serving models pull {alias}"


def fetched_path(path: str) -> str:
    """Local folder of a model; one on a hub is downloaded first.

    Raises:
        ModelFilesError: it can't be downloaded; names model, host and reason.

    """
    from mlx_serving.worker.engine.model_hub import Hub, download, hub_model

    model = hub_model(path)
    return path if model is None else str(download(model, Hub(), note))


def refusal(alias: str, error: ModelFilesError) -> UnknownModel:
    """Build our error for a model whose files are wrong or can't be downloaded."""
    from mlx_serving.worker.engine.model_hub import HubUnreachableError

    kind = ModelUnreachable if isinstance(error, HubUnreachableError) else UnknownModel
    return kind([FieldError(f"models.{alias}", str(error))])


def pull(settings: Settings, alias: str) -> None:
    """Download a model of the settings; for a branch, only name its present commit.

    Raises:
        UnknownModel: there is no such alias, it can't be downloaded, or it is not pinned.

    """
    from mlx_serving.cli.options import require_engine
    from mlx_serving.worker.engine.model_files import ModelFilesError
    from mlx_serving.worker.engine.model_hub import Hub, hub_model, resolve

    model = hub_model(known_path(settings, alias))
    if model is None:
        return  # a folder: nothing to download
    require_engine()
    try:
        if not model.pinned:
            commit = resolve(model, Hub())
            reason = f"{model} is not pinned; it is {commit} now: write that"
            raise UnknownModel([FieldError(f"models.{alias}", reason)])
        fetched_path(str(model))
    except ModelFilesError as error:
        raise refusal(alias, error) from None


BYTES_A_MB: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelView:
    """One alias; `problem` says why it can't be loaded here.

    `size_bytes` counts its files, `weight_bytes` what is loaded of them: that counts for
    `worker.model_budget_bytes`.
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
    views = [model_view(name, found_path(known_path(settings, name))) for name in shown]
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
