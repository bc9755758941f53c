"""From a job to the grammar that its rows follow, and to the format that their text is read in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from mlx_serving.common.errors import InvalidJob
from mlx_serving.worker.engine.structured.grammar import output_grammar
from mlx_serving.worker.engine.structured.grammar_compiler import GrammarCompiler, tokenizer_source
from mlx_serving.worker.engine.structured.parser import REASONING, TEXT
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat, RequestFormat

if TYPE_CHECKING:
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.worker.engine.interface import Grammar, ModelInfo, OutputFormat, Request


class OutputPlanner:
    """Plans the output of one model's jobs. Used by the dispatcher's thread."""

    def __init__(self, tokenizer: Any, info: ModelInfo) -> None:  # noqa: ANN401 - forwards by getattr
        """Take mlx-lm's TokenizerWrapper, and the model's vocabulary and eos ids."""
        self._tokenizer = tokenizer
        self._format = ModelFormat.of(tokenizer)
        self._compiler = GrammarCompiler(
            tokenizer_source(tokenizer, info.vocab_size, info.eos_token_ids)
        )

    def warm_up(self) -> None:
        """Build now what the first grammar would have to wait for."""
        self._compiler.warm_up()

    def close(self) -> None:
        """End the process that tries grammars."""
        self._compiler.close()

    def plan(self, job: GenerationJob, request: Request) -> Request:
        """Return the job's request with its grammar and its format.

        Raises:
            InvalidSchema: the job's schema, regex or grammar can't be compiled.
            InvalidJob: tools that this model has no format for.
        """
        if not request.choices:
            return request
        if job.tools and self._format.parse is None:
            raise InvalidJob([("tools", "mlx-lm knows no format of tool calls for this model")])
        reasoning = self._in_reasoning(job, request.prompt)
        grammar = self._grammar(job, reasoning=reasoning)
        form = self._request_format(job, reasoning=reasoning)
        return replace(request, grammar=grammar, format=form)

    def _in_reasoning(self, job: GenerationJob, prompt: tuple[int, ...]) -> bool:
        """Whether the prompt ends within the model's reasoning, which some templates open."""
        if job.messages is None or not self._tokenizer.has_thinking:
            return False
        tokens = list(prompt)
        start: int = self._tokenizer.rfind_think_start(tokens)
        end: int = self._tokenizer.rfind_think_end(tokens)
        return start > end

    def _grammar(self, job: GenerationJob, *, reasoning: bool) -> Grammar | None:
        spec = output_grammar(job, self._format, self._token_of, reasoning=reasoning)
        return None if spec is None else self._compiler.compile(spec.text, spec.path)

    def _request_format(self, job: GenerationJob, *, reasoning: bool) -> OutputFormat | None:
        """The format; None if all text is text: no chat template was used, or no markers exist."""
        tools = tuple(job.template_tools() or ())
        transitions = self._format.transitions if tools else self._format.without_calls()
        if job.messages is None or not any(transitions.values()):
            return None
        state = self._format.initial or (REASONING if reasoning else TEXT)
        return RequestFormat(self._format, state, tools)

    def _token_of(self, marker: str) -> int | None:
        ids = self._tokenizer.encode(marker, add_special_tokens=False)
        special = self._compiler.special_ids(ids)
        return ids[0] if len(ids) == 1 and special[0] else None
