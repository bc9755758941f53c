"""Random words, names and UTF-8 texts: the material of Tally's prompts."""

from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Real words beside random ones, so that what people type is no stranger to the model.
COMMON_WORDS = (
    *_words("cat dog sun tree house water stone river cloud apple bread music paper chair green"),
    *_words("yellow hello world python redis token batch queue worker stream mac metal model"),
    *_words("tally kitten count from to down echo reverse spell sort json dice again that weather"),
    *_words("time in add and user system tool name city string object type the you are sky clear"),
    *_words("rain snow wind"),
)
CITIES = (
    *_words("Paris London Berlin Rome Madrid Oslo Tokyo Cairo Lima Delhi Zürich München Kraków"),
    *_words("Málaga Reykjavík Århus Łódź 東京 北京 서울 Москва Αθήνα"),
    *("New York", "São Paulo", "Los Angeles", "Hong Kong"),
)
NAMES = _words("Ann Bob Eve Max Zoe Ada Tim Liv Leo Mia Ivo Uma Kim Sam Noa Joe")
KEYS = _words("name age city id size color count x y key type time sky a b")

_SYLLABLE_STARTS = _words("b c d f g h k l m n p r s t v w st tr ch sh")
_SYLLABLE_ENDS = _words("a e i o u an er in on el ar it us ea oo")
# Inclusive code point ranges, from every UTF-8 width.
_CODE_POINTS = (
    (0x00C0, 0x024F),  # Latin with accents
    (0x0391, 0x03C9),  # Greek
    (0x0410, 0x044F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0905, 0x0939),  # Devanagari
    (0x2190, 0x21FF),  # arrows
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FFF),  # CJK
    (0xAC00, 0xD7A3),  # Hangul
    (0x1F300, 0x1F6FF),  # emoji
    (0x1F900, 0x1F9FF),  # more emoji
    (0x20000, 0x2A6DF),  # CJK extension B
)
_CLUSTERS = _words("👩‍💻 👨‍👩‍👧 🇩🇪 🇯🇵 👍🏽 ❤️ é ñ 🏳️‍🌈 नि")
_PUNCTUATION = "!?.,:;-+*/=()[]{}<>@#%&_'\"$^~|\\"


def word(rng: Random, shortest: int, longest: int) -> str:
    """A lower-case ASCII word of `shortest` to `longest` letters: real, pronounceable or random."""
    kind = rng.random()
    if kind < 0.08:
        text = rng.choice(COMMON_WORDS)
    elif kind < 0.4:
        text = pronounceable(rng, rng.randint(1, 4))
    else:
        text = "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))
    if shortest <= len(text) <= longest:
        return text
    return "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))


def pronounceable(rng: Random, syllables: int) -> str:
    """A made-up word of so many syllables."""
    return "".join(
        rng.choice(_SYLLABLE_STARTS) + rng.choice(_SYLLABLE_ENDS) for _ in range(syllables)
    )


def city(rng: Random) -> str:
    """A city's name: real, or made up of one or two capitalised words."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(CITIES)
    if kind < 0.4:
        return f"{word(rng, 2, 5).title()} {word(rng, 3, 6).title()}"
    return word(rng, 3, 9).title()


def name(rng: Random) -> str:
    """A name or another word, mostly capitalised."""
    text = rng.choice(NAMES) if rng.random() < 0.3 else word(rng, 2, 8)
    return text.title() if rng.random() < 0.7 else text


def wild_text(rng: Random, longest_bytes: int) -> str:
    """A one-line text of ASCII and multi-byte pieces, no space at its ends.

    At most `longest_bytes` UTF-8 bytes.
    """
    parts = [_piece(rng) for _ in range(rng.randint(1, 5))]
    while len(" ".join(parts).encode()) > longest_bytes:
        parts.pop()
    return " ".join(parts) or rng.choice(LETTERS)


def _piece(rng: Random) -> str:
    kind = rng.randrange(8)
    if kind <= 2:
        text = word(rng, 1, 8)
        return text if kind else text.title()
    if kind == 3:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind == 4:
        return word(rng, 1, 5) + rng.choice(_PUNCTUATION) * rng.randint(1, 2)
    if kind == 5:
        return rng.choice(_CLUSTERS)
    if kind == 6:  # one script, as people write
        low, high = rng.choice(_CODE_POINTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 5)))
    return "".join(chr(rng.randint(*rng.choice(_CODE_POINTS))) for _ in range(rng.randint(1, 4)))
