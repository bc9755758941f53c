"""Limits on what a job may hold, so that no single job can harm a worker or Redis."""

from __future__ import annotations

from typing import Final

PAYLOAD_BYTES: Final = 4 * 1024 * 1024
"""UTF-8 bytes of all strings of a job, and of its JSON form (settings may lower it)."""

JSON_DEPTH: Final = 32
"""Nested lists and objects, counted from the job itself."""

MESSAGES: Final = 4096
TOOLS: Final = 128
TOKENS: Final = 1_048_576
"""Most tokens that one job may ask for: all choices, each token with its alternatives."""

CHOICES: Final = 128
TOP_LOGPROBS: Final = 20
LOGIT_BIAS: Final = 100
LOGIT_BIASES: Final = 1024

SECONDS: Final = 30 * 24 * 3600
"""Longest deadline, timeout or time to keep a result: 30 days."""

LABEL: Final = r"^[!-~]{1,128}$"
"""A tenant's name or an idempotency key: printable ASCII without blanks."""

STOP_STRINGS: Final = 16
STOP_CHARS: Final = 256
METADATA_ITEMS: Final = 16
METADATA_KEY_CHARS: Final = 64
METADATA_VALUE_CHARS: Final = 512
ATTEMPTS: Final = 100
SEED: Final = 2**64
"""Seeds are 0 ≤ seed < 2**64."""

SCHEMA_BYTES: Final = 65_536
"""Of a schema as JSON; the worker bounds the time that it may take to compile."""

SCHEMA_NAME_CHARS: Final = 64
REGEX_CHARS: Final = 4096
GRAMMAR_CHARS: Final = 16_384
