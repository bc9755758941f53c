"""What a row's grammar and its parser make of a step's token and text. Pure."""

from typing import Final

from mlx_serving.worker.engine.sequence import (
    FINISH_STOP,
    FINISH_TOOL_CALLS,
    INVALID_TOKEN,
    Output,
    RowError,
    Sequence,
)

NAN_LOGITS: Final = RowError("nan_logits", "the model's logits for this row were not finite")


def row_error(row: Sequence, token: int) -> RowError | None:
    """Why the row can't go on with this token; None where it can."""
    failure = row.matcher.failure if row.matcher is not None else None
    if failure is not None:
        return RowError("grammar_failed", f"the grammar can't be followed further: {failure}")
    return NAN_LOGITS if token == INVALID_TOKEN else None


def grammar_ended(row: Sequence) -> bool:
    """Whether the row's grammar is satisfied, so that nothing more can follow."""
    return row.matcher is not None and row.matcher.ended


def parse_output(row: Sequence, output: Output, *, ended_itself: bool) -> None:
    """Split the output's text into its parts, in place; a row that called tools ends by that.

    `ended_itself`: the model or the grammar ended the text, no stop string or limit.
    """
    if row.parser is None:
        return
    parts = row.parser.push(output.text)
    if output.finish_reason is not None:
        parts += row.parser.finish(whole=ended_itself)
    output.text, output.reasoning = parts.text, parts.reasoning
    output.tool_calls = parts.tool_calls
    if output.finish_reason == FINISH_STOP and row.parser.called:
        output.finish_reason = FINISH_TOOL_CALLS
