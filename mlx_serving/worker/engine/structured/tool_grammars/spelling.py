"""Texts of a grammar as a model's tokenizer spells them: some markers are tokens of their own.

Rules are in llguidance's Lark dialect, as in `grammar`.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Final

TokenOf = Callable[[str], int | None]
"""From a marker to its token's id; None: it is no special token, but spelled by text."""

ANY_TEXT: Final = "(?s:.*)"
_MARKER: Final = re.compile(r"""(</?\|?[\w:"]+\|?>|\[[A-Z_]+\])""")


class Spelling:
    """Writes literals and free texts for one tokenizer."""

    def __init__(self, token_of: TokenOf) -> None:
        """Take the function that knows the tokenizer's special tokens."""
        self._token_of = token_of

    def literal(self, text: str) -> str:
        """Return a text as the right side of a rule; special tokens are written by their id."""
        parts, plain = [], ""
        for piece in _MARKER.split(text):
            token = self._token(piece)
            if token is None:
                plain += piece
                continue
            parts += [json.dumps(plain)] * bool(plain) + [f"<[{token}]>"]
            plain = ""
        return " ".join(parts + [json.dumps(plain)] * bool(plain)) or '""'

    def begins_with_token(self, text: str) -> bool:
        """Whether the text begins with a special token, which no free text can hold."""
        found = _MARKER.match(text)
        return found is not None and self._token_of(found[0]) is not None

    def text_up_to(
        self, name: str, bodies: Sequence[str], closing: str, *, never: Sequence[str] = ()
    ) -> tuple[str, list[str]]:
        """Return the right side for a text up to `closing`, and the rules that it needs.

        Args:
            name: of the rule, unique in the grammar, in lower case.
            bodies: regexes, all of which the text must match.
            closing: the text's end, which the text must not hold.
            never: regexes that the text must not match.
        """
        token = self.begins_with_token(closing)
        end = "" if token else escaped(closing)
        forbidden = [f"{regex}{end}" for regex in never]
        if not token:
            forbidden.append(f"{ANY_TEXT}{end}(?s:.+)")
        whole = " & ".join(
            [*(f"/{body}{end}/" for body in bodies), *(f"~/{regex}/" for regex in forbidden)]
        )
        terminal = name.upper()
        if token:
            return f"{terminal} {self.literal(closing)}", [f"{terminal}: {whole}"]
        # Lazy: it ends at the first `closing`, which must not become a part of the text.
        return name, [f"{name}[lazy]: {terminal}", f"{terminal}: {whole}"]

    def _token(self, piece: str) -> int | None:
        return self._token_of(piece) if _MARKER.fullmatch(piece) else None


def escaped(text: str) -> str:
    """Return a text escaped for the inside of a /regex/."""
    return re.escape(text).replace("/", "\\/").replace("\n", "n")


def listed(name: str, items: Sequence[tuple[str, bool]], separator: str) -> tuple[str, list[str]]:
    """Return the rule of a list of items in their order, some optional, and the rules it needs.

    Args:
        name: the beginning of the rules' names.
        items: rules, and for each whether it is required.
        separator: between two items, as the right side of a rule.
    """
    lines = [f'{name}_first{len(items)}: ""', f'{name}_next{len(items)}: ""']
    for n, (item, required) in enumerate(items):
        first, following = f"{item} {name}_next{n + 1}", f"{separator} {item} {name}_next{n + 1}"
        skip = ("", "") if required else (f" | {name}_first{n + 1}", f" | {name}_next{n + 1}")
        lines += [f"{name}_first{n}: {first}{skip[0]}", f"{name}_next{n}: {following}{skip[1]}"]
    return f"{name}_first0", lines
