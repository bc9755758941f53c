"""What several commands share: options, settings, the check for an installed engine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mlx_serving.cli.console import note
from mlx_serving.common.errors import MissingDependency

if TYPE_CHECKING:
    from mlx_serving.common.settings import Settings

ENGINE: Final = ("mlx", "mlx_lm")


INSTALL: Final = 'pip install "mlx-serving[worker]"'


def missing_engine() -> list[str]:
    """Packages of the [worker] extra that are not installed."""
    return [package for package in ENGINE if find_spec(package) is None]


def require_engine() -> None:
    """Check that the engine is installed.

    Raises:
        MissingDependency: names what is missing and the command that installs it.

    """
    missing = missing_engine()
    if missing:
        raise MissingDependency(f"{' and '.join(missing)} not installed: {INSTALL}")


RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        help="Redis to use; without it MLX_SERVING_REDIS_URL, the settings file, or localhost. "
        "Give a password by the environment: others can read a command line.",
        show_default=False,
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Model = Annotated[str, typer.Option("--model", "-m", help="Alias of the model.")]


ForModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Use this model's Redis, if it has its own."),
]


def read_settings(redis_url: str | None = None) -> Settings:
    """Read the settings; a URL from the command line applies to every model.

    Raises:
        InvalidSettings: names each wrong setting.

    """
    from mlx_serving.common.settings import load_settings, unknown_variables

    for name in unknown_variables():
        note(f"warning: {name} is not a setting and has no effect")
    if redis_url is None:
        return load_settings()
    return load_settings(redis__url=redis_url, redis__by_model={})
