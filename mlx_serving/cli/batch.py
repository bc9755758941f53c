"""The commands of `mlx-serving batch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_serving.cli.console import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    harmless,
    note,
    print_json,
    print_table,
)
from mlx_serving.cli.options import AsJson, RedisUrlOption, read_settings

Name = Annotated[
    str | None,
    typer.Argument(help="Id, folder or input file of a batch; without it, the last one."),
]


OutputFile = Annotated[
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
    int | None, typer.Option(help="Most tokens to decode, for lines that set none.")
]


Temperature = Annotated[float | None, typer.Option(help="Temperature, for lines that set none.")]


Raw = Annotated[
    bool, typer.Option("--raw", help="Plain prompts go to the model as they are: no chat template.")
]


LineOrder = Annotated[
    Literal["prefix", "file"],
    typer.Option(help="prefix: lines that begin alike run together. file: the file's order."),
]


CompletionWindow = Annotated[
    str, typer.Option(help="After this time (24h, 90m, 2d) unfinished lines expire.")
]


Strict = Annotated[bool, typer.Option("--strict", help="Run nothing if any line is wrong.")]


Depth = Annotated[int, typer.Option(help="Lines of a model to keep waiting in its queue.")]


InFlight = Annotated[int, typer.Option(help="Most lines of a model in Redis at once.")]


Tenant = Annotated[
    str | None, typer.Option(help="Whose jobs they are: its limits and its share apply.")
]


Folder = Annotated[
    Path | None, typer.Option(help="Where state and results go; by default beside the file.")
]


Wait = Annotated[
    bool, typer.Option("--wait", help="Watch it to its end; Ctrl-C leaves it running.")
]


Foreground = Annotated[
    bool, typer.Option("--foreground", help="Run it in this process, for service managers.")
]


def read_model_map(texts: list[str] | None) -> dict[str, str]:
    """Read FOREIGN=OURS pairs. Raises typer.BadParameter."""
    pairs = [(text, *text.partition("=")) for text in texts or []]
    for text, foreign, _, ours in pairs:
        if not (foreign and ours):
            raise typer.BadParameter(f"--model-map takes FOREIGN=OURS, not {text!r}")
    return {foreign: ours for _, foreign, _, ours in pairs}


STDIN = "-"


app = typer.Typer(
    no_args_is_help=True,
    help="Bulk files in the OpenAI Batch format: drop one in the evening, read results.",
)


@app.command()
def submit(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    file: Requests,
    model: LineModel = None,
    model_map: ModelMap = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    raw: Raw = False,
    order: LineOrder = "prefix",
    completion_window: CompletionWindow = "24h",
    strict: Strict = False,
    depth: Depth = 512,
    in_flight: InFlight = 8192,
    tenant: Tenant = None,
    folder: Folder = None,
    wait: Wait = False,
    as_json: AsJson = False,
    redis_url: RedisUrlOption = None,
) -> None:
    """Check a file of requests and run it in the background.

    Lines are OpenAI's (custom_id, method, url, body), or plain prompts: a JSON string, or
    {"prompt": …} with any field of a body. A wrong line becomes an error line; the others run.

    Exit status: 0, or 1 if no line can be run (with --wait: if the batch did not complete).
    """
    from mlx_serving.cli.batch_view import Reading, describe, watch_batch
    from mlx_serving.producer.client import Client

    batches = Client(settings=read_settings(redis_url)).batches
    with Reading() as reading:
        batch = batches.submit(
            sys.stdin.buffer if file == STDIN else file, folder=folder, progress=reading.show,
            model=model, model_map=read_model_map(model_map), max_tokens=max_tokens,
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
def status(name: Name = None, as_json: AsJson = False, redis_url: RedisUrlOption = None) -> None:
    """Show a batch, from any machine that reaches Redis."""
    from mlx_serving.cli.batch_view import report_rows
    from mlx_serving.producer.client import Client

    report = Client(settings=read_settings(redis_url)).batches.report(name)
    if as_json:
        print_json(report.batch)
    else:
        print_table(("field", "value"), report_rows(report))


@app.command("list")
def list_(as_json: AsJson = False, redis_url: RedisUrlOption = None) -> None:
    """List the batches of the last 30 days."""
    from mlx_serving.cli.batch_view import state_of
    from mlx_serving.producer.client import Client

    reports = Client(settings=read_settings(redis_url)).batches.reports()
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
def watch(name: Name = None, redis_url: RedisUrlOption = None) -> None:
    """Follow a batch: progress, rate, time left, failures. Ctrl-C stops only the watching.

    Exit status: 0 if the batch completed, else 1.
    """
    from mlx_serving.cli.batch_view import watch_batch
    from mlx_serving.producer.client import Client

    batches = Client(settings=read_settings(redis_url)).batches
    batch = watch_batch(batches, batches.report(name).batch.id)
    if batch.status != "completed":
        raise typer.Exit(EXIT_ERROR)


@app.command()
def results(name: Name = None, output: OutputFile = None, redis_url: RedisUrlOption = None) -> None:
    """Write the output lines so far, each once, also while the batch runs."""
    from mlx_serving.producer.client import Client

    folder = Client(settings=read_settings(redis_url)).batches.folder(name)
    _export(folder.output, folder.read().batch.id, output)
    batch = folder.read().batch
    if not batch.ended:
        counts = batch.request_counts
        note(f"{batch.id} is {batch.status}: {counts.completed} of {counts.total} lines so far")


@app.command()
def errors(
    name: Name = None,
    output: OutputFile = None,
    as_json: AsJson = False,
    redis_url: RedisUrlOption = None,
) -> None:
    """Show the lines that failed or were refused: line, field and reason."""
    from mlx_serving.producer.client import Client

    batches = Client(settings=read_settings(redis_url)).batches
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
def cancel(name: Name = None, redis_url: RedisUrlOption = None) -> None:
    """Cancel a batch, from any machine; what has finished is kept."""
    from mlx_serving.producer.client import Client

    batch = Client(settings=read_settings(redis_url)).batches.cancel(name)
    typer.echo(batch.status if batch.ended else "cancelling")


@app.command()
def resume(
    name: Name = None,
    foreground: Foreground = False,
    redis_url: RedisUrlOption = None,
) -> None:
    """Go on with a batch whose runner is gone, on the machine that has its folder.

    No effect on a batch that has a runner or has ended.
    """
    from mlx_serving.producer.client import Client

    batches = Client(settings=read_settings(redis_url)).batches
    try:
        batch = batches.run(name) if foreground else batches.resume(name)
    except KeyboardInterrupt:
        note("stopped; `mlx-serving batch resume` goes on")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(batch.status)


def _export(path: Path, batch_id: str, output: Path | None) -> None:
    from mlx_serving.producer.batch.result_file import copy_lines, whole_lines

    lines = whole_lines(path, batch_id)
    if output is None:
        for line in lines:
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    else:
        note(f"{copy_lines(lines, output)} lines in {output}")
