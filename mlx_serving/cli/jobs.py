"""`mlx-serving status`, `cancel`, `pardon`, `forget` and `requeue`: one job, by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlx_serving.cli.console import harmless, print_json, print_table
from mlx_serving.cli.options import AsJson, ForModel, RedisUrlOption, read_settings

if TYPE_CHECKING:
    from mlx_serving.cli.overview import QueueView
    from mlx_serving.common.states import JobState


def status(
    job_id: Annotated[str | None, typer.Argument(help="A job; without it, everything.")] = None,
    as_json: AsJson = False,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Show a job; without an id, show the queues and the workers."""
    from mlx_serving.cli.overview import job_view, oddities, read_overview
    from mlx_serving.cli.top_view import failures_of, models_of, span, state_of
    from mlx_serving.producer.client import Client

    with Client(settings=read_settings(redis_url), model=model) as client:
        if job_id is not None:
            view = job_view(client.status(job_id))
            if as_json:
                print_json(view)
            else:
                print_table(("field", "value"), [(k, v) for k, v in view.items() if v is not None])
            return
        overview = read_overview(client.endpoint)
    if as_json:
        print_json(overview)
        return
    print_table(
        ("queue", "queued", "running", "open", "oldest"),
        [(q.name, q.queued, q.running, q.open, span(q.oldest_seconds)) for q in overview.queues],
    )
    typer.echo()
    print_table(
        ("worker", "model", "state", "held", "KV tokens", "device", "acceleration"),
        [
            (
                w.name,
                models_of(w),
                state_of(w),
                w.held,
                w.kv_tokens_capacity,
                w.device,
                w.acceleration,
            )
            for w in overview.workers
        ],
    )
    for failure in failures_of(overview):
        typer.echo(f"\n{failure}")
    _print_isolated(overview.queues)
    for oddity in oddities(overview):
        typer.echo(f"\n{harmless(oddity)}")
    if overview.suspended:
        typer.echo("\nRQ is suspended: no worker takes a job until `rq resume`")


def _print_isolated(queues: list[QueueView]) -> None:
    for queue in queues:
        for job_id in queue.isolated:
            typer.echo(
                f"\n{queue.name}: job {job_id} is isolated: its workers were lost while it ran "
                f"alone. `mlx-serving pardon {job_id}` runs it again, `cancel` ends it"
            )


def cancel(
    job_id: Annotated[str, typer.Argument(help="The job to cancel.")],
    as_json: AsJson = False,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Cancel a job: a queued one at once, a running one within two steps.

    Prints the state after the call; `running` means that its worker has been told.
    """
    from mlx_serving.producer.client import Client

    with Client(settings=read_settings(redis_url), model=model) as client:
        _print_state(job_id, client.cancel(job_id), as_json=as_json)


def forget(
    job_id: Annotated[str, typer.Argument(help="The job to forget.")],
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Delete a job that ended from Redis, with its prompt, events and result.

    A job that waits or runs is refused: cancel it first.
    """
    from mlx_serving.producer.client import Client

    with Client(settings=read_settings(redis_url), model=model) as client:
        client.forget(job_id)


def requeue(
    job_id: Annotated[str, typer.Argument(help="The job to run again.")],
    as_json: AsJson = False,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Run a job again that failed, died, expired or was cancelled, under its id.

    Prints the state after the call; a job that waits, runs or finished stays as it is.
    """
    from mlx_serving.producer.client import Client

    with Client(settings=read_settings(redis_url), model=model) as client:
        _print_state(job_id, client.requeue(job_id), as_json=as_json)


def _print_state(job_id: str, state: JobState, *, as_json: bool) -> None:
    if as_json:
        print_json({"id": job_id, "state": state.value})
    else:
        typer.echo(state.value)


def pardon(
    job_id: Annotated[str, typer.Argument(help="A job that is isolated.")],
    as_json: AsJson = False,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Let a job run again that is isolated because workers were lost with it.

    Its losses are taken back: it runs as if it had none. Prints the job's state.
    """
    from mlx_serving.common.protocol import ended_calls
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.common.redis.connection import connect, resolve
    from mlx_serving.common.redis.retrying import answered
    from mlx_serving.producer.base import not_found

    endpoint = resolve(read_settings(redis_url), model)
    with connect(endpoint) as connection:
        protocol = Protocol(connection, endpoint.keys)
        state = answered(lambda: protocol.run(ended_calls.pardon(job_id)))
    if state is None:
        raise not_found(job_id)
    _print_state(job_id, state, as_json=as_json)
