"""How a model's tokenizer spells what a grammar spells out: some markers are tokens of their own.

Rules are in llguidance's Lark dialect, as in `output_grammar`.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Final

TokenOf = Callable[[str], int | None]
"""From a marker to its token's id, where it is a token that no text spells."""

ANY_TEXT: Final = "(?s:.*)"
_MARKER: Final = re.compile(r"""(</?\|?[\w:"]+\|?>|\[[A-Z_]+\])""")


class Spelling:
    """Literals and free texts, in the words of one tokenizer."""

    def __init__(self, token_of: TokenOf) -> None:
        """Take what knows the tokenizer's special tokens."""
        self._token_of = token_of

    def literal(self, text: str) -> str:
        """Return a text as the right side of a rule; markers that are tokens stand by their id."""
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
        """Whether the text begins with a marker that is a token, which no free text can hold."""
        found = _MARKER.match(text)
        return found is not None and self._token_of(found[0]) is not None

    def text_up_to(
        self, name: str, bodies: Sequence[str], closing: str, *, never: Sequence[str] = ()
    ) -> tuple[str, list[str]]:
        """Return how a text and what ends it are called for, and the rules for that.

        Args:
            name: of the rule, unique in the grammar, in small letters.
            bodies: regexes that the text matches, all of them.
            closing: what ends it; the text doesn't hold it.
            never: regexes of what the text must not be.
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
        # It ends where it can first, so that what ends it isn't taken for text.
        return name, [f"{name}[lazy]: {terminal}", f"{terminal}: {whole}"]

    def _token(self, piece: str) -> int | None:
        return self._token_of(piece) if _MARKER.fullmatch(piece) else None


def escaped(text: str) -> str:
    """Text for the inside of a /regex/."""
    return re.escape(text).replace("/", "\\/").replace("\n", "n")


def listed(name: str, items: Sequence[tuple[str, bool]], separator: str) -> tuple[str, list[str]]:
    """Return the rule of a list of items in their order, each optional or not, and what it needs.

    Args:
        name: that the rules' names begin with.
        items: rules, each with whether it is required.
        separator: between two items that are there, as the right side of a rule.
    """
    lines = [f'{name}_first{len(items)}: ""', f'{name}_next{len(items)}: ""']
    for n, (item, required) in enumerate(items):
        first, following = f"{item} {name}_next{n + 1}", f"{separator} {item} {name}_next{n + 1}"
        skip = ("", "") if required else (f" | {name}_first{n + 1}", f" | {name}_next{n + 1}")
        lines += [f"{name}_first{n}: {first}{skip[0]}", f"{name}_next{n}: {following}{skip[1]}"]
    return f"{name}_first0", lines
