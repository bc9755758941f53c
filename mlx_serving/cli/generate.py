"""`mlx-serving generate`: one job, streamed to the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_serving.cli.options import AsJson, Model, RedisUrlOption, read_settings

if TYPE_CHECKING:
    from mlx_serving.common.job.schema import GenerationJob

STDIN = "-"
ABANDON_SECONDS = 30.0
"""Ends the job of a command that was killed without a chance to cancel it."""


def generate(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    prompt: Annotated[str, typer.Argument(help="What the user says; - reads standard input.")],
    model: Model = "tally",
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text itself: no chat template.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to decode.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus: keep this much mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep this share of the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="How many choices; several are printed at the end.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Print log probabilities of tokens, and of N likeliest ones.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    lane: Annotated[
        Literal["interactive", "default", "bulk"], typer.Option(help="Priority of the job.")
    ] = "interactive",
    tenant: Annotated[str | None, typer.Option(help="Whose job it is.")] = None,
    events: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print usage and timings on stderr.")
    ] = False,
    redis_url: RedisUrlOption = None,
) -> None:
    """Generate a text. Ctrl-C cancels the job, as do SIGTERM, a closed terminal, a closed pipe.

    Exit status: 0, or 1 if the job did not finish, or 128 and the signal's number (Ctrl-C: 130).
    """
    from mlx_serving.cli.streaming import stream_job

    text = sys.stdin.read() if prompt == STDIN else prompt
    job = build_job(
        text, raw=raw, system=system, model=model, lane=lane, temperature=temperature,
        max_tokens=max_tokens, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop,
        n=n, logprobs=None if logprobs is None else True, top_logprobs=logprobs or None,
        tenant=tenant, abandon_after=ABANDON_SECONDS,
    )  # fmt: skip
    status = stream_job(job, read_settings(redis_url), as_json=events, verbose=verbose)
    raise typer.Exit(status)


def build_job(text: str, *, raw: bool, system: str | None, **fields: Any) -> GenerationJob:
    """Build the job; options that were not given keep the job's own defaults.

    Raises:
        InvalidJob: names each wrong field.
        typer.BadParameter: --system with --raw.

    """
    from mlx_serving.common.job.schema import GenerationJob

    given = {name: value for name, value in fields.items() if value not in (None, [])}
    if raw:
        if system is not None:
            raise typer.BadParameter("--system needs a chat message: leave out --raw")
        return GenerationJob.build(prompt=text, **given)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return GenerationJob.build(messages=[*messages, {"role": "user", "content": text}], **given)
