"""Marks: what a job's prompt shares with other jobs, so that one worker computes it for all.

A claim notes who took a job of a mark, and leaves the next one to that worker for a moment (see
``claim.lua``). A producer has no tokenizer, so a mark is a hash of text, salted with what the
prefix cache keeps apart: the model, the tenant, and what else the chat template is given.
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

BEGINNING_CHARS: Final = 512  # about 128 tokens: less is computed sooner than it is waited for
PROMPT_CHARS: Final = 4 * BEGINNING_CHARS  # of a plain prompt, what tells a conversation
MARK_BYTES: Final = 8

_SYSTEM: Final = frozenset({"system", "developer"})


def marks(job: GenerationJob) -> str:
    """Return ``<conversation>,<beginning>``, 16 hex digits each or empty; '' where both are.

    All turns of a conversation have the first one: a hash of tools, system turns and the first turn
    after them (of a plain prompt, its first `PROMPT_CHARS`). Jobs of the lane `bulk` have none:
    a line is no conversation. The second one is shared by all that begin alike: a hash of tools
    and system turns where these are long enough, else of the first `BEGINNING_CHARS`.
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
