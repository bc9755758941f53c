"""The commands of `mlx-serving batch`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from mlx_serving.cli.batch import options
from mlx_serving.cli.console import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    harmless,
    note,
    print_json,
    print_table,
)
from mlx_serving.cli.options import AsJson, RedisUrl, read_settings

STDIN = "-"

app = typer.Typer(
    no_args_is_help=True,
    help="Bulk files in the OpenAI Batch format: drop one in the evening, read results.",
)


@app.command()
def submit(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    file: options.Requests,
    model: options.LineModel = None,
    model_map: options.ModelMap = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    raw: options.Raw = False,
    order: options.Order = "prefix",
    completion_window: options.CompletionWindow = "24h",
    strict: options.Strict = False,
    depth: options.Depth = 512,
    in_flight: options.InFlight = 8192,
    tenant: options.Tenant = None,
    folder: options.Folder = None,
    wait: options.Wait = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Check a file of requests and run it in the background.

    Lines are OpenAI's (custom_id, method, url, body), or plain prompts: a JSON string, or
    {"prompt": …} with any field of a body. A wrong line becomes an error line; the others run.

    Exit status: 0, or 1 where no line can be run (with --wait: where the batch did not complete).
    """
    from mlx_serving.cli.batch.view import Reading, describe, watch_batch
    from mlx_serving.producer.batch.api import Batches

    batches = Batches(read_settings(redis_url))
    with Reading() as reading:
        batch = batches.submit(
            sys.stdin.buffer if file == STDIN else file, folder=folder, progress=reading.show,
            model=model, model_map=options.model_map(model_map), max_tokens=max_tokens,
            temperature=temperature, raw=raw, order=order, completion_window=completion_window,
            strict=strict, depth=depth, in_flight=in_flight, tenant=tenant,
        )  # fmt: skip
    if as_json:
        print_json(batch)
    else:
        typer.echo(batch.id)
        describe(batches.folder(batch.id).read(), known=set(read_settings(redis_url).models))
    if wait and not batch.ended:
        batch = watch_batch(batches, batch.id)
    if batch.status == "failed" or (wait and batch.status != "completed"):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def status(name: options.Name = None, as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """Show a batch, from any machine that reaches Redis."""
    from mlx_serving.cli.batch.view import report_rows
    from mlx_serving.producer.batch.api import Batches

    report = Batches(read_settings(redis_url)).report(name)
    if as_json:
        print_json(report.batch)
    else:
        print_table(("field", "value"), report_rows(report))


@app.command("list")
def list_(as_json: AsJson = False, redis_url: RedisUrl = None) -> None:
    """List the batches of the last 30 days."""
    from mlx_serving.cli.batch.view import state_of
    from mlx_serving.producer.batch.api import Batches

    reports = Batches(read_settings(redis_url)).reports()
    if as_json:
        print_json([report.batch for report in reports])
        return
    rows = [
        (r.batch.id, state_of(r), r.batch.request_counts.total, r.batch.request_counts.completed,
         r.batch.request_counts.failed, r.host, r.folder)
        for r in reports
    ]  # fmt: skip
    print_table(("batch", "status", "lines", "completed", "failed", "host", "folder"), rows)


@app.command()
def watch(name: options.Name = None, redis_url: RedisUrl = None) -> None:
    """Follow a batch: progress, rate, time left, failures. Ctrl-C stops only the watching.

    Exit status: 0 where the batch completed, else 1.
    """
    from mlx_serving.cli.batch.view import watch_batch
    from mlx_serving.producer.batch.api import Batches

    batches = Batches(read_settings(redis_url))
    batch = watch_batch(batches, batches.report(name).batch.id)
    if batch.status != "completed":
        raise typer.Exit(EXIT_ERROR)


@app.command()
def results(
    name: options.Name = None, output: options.Output = None, redis_url: RedisUrl = None
) -> None:
    """Write the output lines, also of a batch that still runs: whole lines, each once."""
    from mlx_serving.producer.batch.api import Batches

    folder = Batches(read_settings(redis_url)).folder(name)
    _export(folder.output, folder.read().batch.id, output)
    batch = folder.read().batch
    if not batch.ended:
        counts = batch.request_counts
        note(f"{batch.id} is {batch.status}: {counts.completed} of {counts.total} lines so far")


@app.command()
def errors(
    name: options.Name = None,
    output: options.Output = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
) -> None:
    """Show the lines that failed or were refused: line, field and reason."""
    from mlx_serving.producer.batch.api import Batches

    batches = Batches(read_settings(redis_url))
    if output is not None or as_json:
        folder = batches.folder(name)
        _export(folder.errors, folder.read().batch.id, output)
        return
    rows = (
        (line["error"]["line"], harmless(str(line["custom_id"] or "")), line["error"]["code"],
         harmless(line["error"]["message"]))
        for line in batches.errors(name)
    )  # fmt: skip
    print_table(("line", "custom_id", "code", "message"), rows)


@app.command()
def cancel(name: options.Name = None, redis_url: RedisUrl = None) -> None:
    """Cancel a batch, from any machine; what has finished is kept."""
    from mlx_serving.producer.batch.api import Batches

    batch = Batches(read_settings(redis_url)).cancel(name)
    typer.echo(batch.status if batch.ended else "cancelling")


@app.command()
def resume(
    name: options.Name = None,
    foreground: options.Foreground = False,
    redis_url: RedisUrl = None,
) -> None:
    """Go on with a batch whose runner is gone, on the machine that has its folder.

    Without effect on one that has a runner, or has ended.
    """
    from mlx_serving.producer.batch.api import Batches

    batches = Batches(read_settings(redis_url))
    try:
        batch = batches.run(name) if foreground else batches.resume(name)
    except KeyboardInterrupt:
        note("stopped; `mlx-serving batch resume` goes on")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(batch.status)


def _export(path: Path, batch_id: str, output: Path | None) -> None:
    from mlx_serving.producer.batch.exporting import copy_lines, whole_lines

    lines = whole_lines(path, batch_id)
    if output is None:
        for line in lines:
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    else:
        note(f"{copy_lines(lines, output)} lines in {output}")
