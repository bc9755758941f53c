"""The `mlx-serving` command: its groups, and how their errors end the process."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_serving import __version__
from mlx_serving.cli.batch import app as batch
from mlx_serving.cli.console import EXIT_ERROR, EXIT_INTERRUPTED, fail, fail_at_output
from mlx_serving.cli.doctor.command import doctor
from mlx_serving.cli.generate import generate
from mlx_serving.cli.jobs import cancel, forget, pardon, requeue, status
from mlx_serving.cli.models import models
from mlx_serving.cli.tenants import app as tenants
from mlx_serving.cli.top import top
from mlx_serving.cli.worker import worker
from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.interpreter import shut_out_current_folder


class Commands(TyperGroup):
    """Turns our errors into one line and exit status 1, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 -- the base class's own types are private
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MlxServingError as error:
            fail(error)
            raise typer.Exit(EXIT_ERROR) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`
                raise
            fail_at_output(error)
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if (fault := _of_redis(error)) is None:
                raise
            fail(fault)
            raise typer.Exit(EXIT_ERROR) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, which hold prompts
    help="Durable text generation on Macs: jobs through Redis and RQ, one batch on MLX.",
)


def _of_redis(error: Exception) -> MlxServingError | None:
    """Our error for one of redis-py's; None for any other."""
    from redis import RedisError  # `--help` does not pay for it

    from mlx_serving.common.redis.faults import fault_of

    return fault_of(error) if isinstance(error, RedisError) else None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-serving {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    del version
    shut_out_current_folder()


@app.command()
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


for command in (worker, generate, status, top, cancel, pardon, forget, requeue, doctor, models):
    app.command()(command)

app.add_typer(batch, name="batch")
app.add_typer(tenants, name="tenants")
