"""Marks: hashes of what a job's prompt shares with other prompts, for prefix affinity.

A claim notes which worker took a job with a mark, and leaves the next job with that mark to the
same worker for a moment (see ``claim.lua``), since it has the prefix cached. A producer has no
tokenizer, so a mark hashes text. The salt is what the prefix cache keeps apart: the model, the
tenant, and the other arguments of the chat template.
"""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from itertools import takewhile
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.job.schema import GenerationJob

BEGINNING_CHARS: Final = 512  # about 128 tokens: to wait costs more than to compute fewer
PROMPT_CHARS: Final = 4 * BEGINNING_CHARS  # of a plain prompt: equal ones are one conversation
MARK_BYTES: Final = 8

_SYSTEM: Final = frozenset({"system", "developer"})


def marks(job: GenerationJob) -> str:
    """Return ``<conversation>,<beginning>``, 16 hex digits each or empty; '' if both are empty.

    All turns of one conversation share the first mark: a hash of tools, system turns and the first
    turn after them (for a plain prompt, of its first `PROMPT_CHARS`). Bulk jobs have none, since a
    line is not a conversation. All prompts with the same beginning share the second mark: a hash of
    tools and system turns if these are long enough, else of the first `BEGINNING_CHARS`.
    """
    mark = partial(_mark, job)
    conversation, beginning = _of_prompt(job, mark) if job.prompt else _of_messages(job, mark)
    if job.lane == "bulk":
        conversation = ""
    return f"{conversation},{beginning}" if conversation or beginning else ""


def _of_prompt(job: GenerationJob, mark: Callable[[str, str], str]) -> tuple[str, str]:
    prompt = job.prompt or ""
    return (
        mark("conversation", prompt[:PROMPT_CHARS]) if len(prompt) >= PROMPT_CHARS else "",
        mark("beginning", prompt[:BEGINNING_CHARS]) if len(prompt) >= BEGINNING_CHARS else "",
    )


def _of_messages(job: GenerationJob, mark: Callable[[str, str], str]) -> tuple[str, str]:
    turns = [f"{message.role}\0{message.text}\0" for message in job.messages or ()]
    first = sum(1 for _ in takewhile(lambda m: m.role in _SYSTEM, job.messages or ()))
    head = _tools(job) + "".join(turns[:first])
    opening = head + "".join(turns[first : first + 1])
    if len(opening) + sum(map(len, turns[first + 1 :])) < BEGINNING_CHARS:
        return "", ""
    shared = head if len(head) >= BEGINNING_CHARS else opening[:BEGINNING_CHARS]
    return (
        mark("conversation", opening),
        mark("beginning", shared) if len(shared) >= BEGINNING_CHARS else "",
    )


def _tools(job: GenerationJob) -> str:
    tools = job.template_tools()
    return msgspec.json.encode(tools).decode() if tools else ""


def _mark(job: GenerationJob, kind: str, text: str) -> str:
    given = msgspec.json.encode(job.chat_template_kwargs, order="deterministic").decode()
    salt = "\0".join((kind, job.model, job.tenant or "", given, ""))
    return blake2b((salt + text).encode(), digest_size=MARK_BYTES).hexdigest()
