"""What a small model was trained on: its words and sizes, from `vocabulary.json` in its folder. Torch-free.

A large model has no such file: nobody can list what it knows.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backbones.model_files import ModelError

FILE = "vocabulary.json"
GRAMMAR = frozenset({
    "a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "without", "by", "for", "from",
    "one", "two", "three", "some", "its", "it", "is",
})  # fmt: skip
"""Words that nothing is drawn for."""
NEAR = 3
"""Known words that are offered for one that is not."""


@dataclass(frozen=True)
class Vocabulary:
    """things: what can be drawn, each with the other words for it. others: colours, styles and the like.

    sizes: width and height in px of the pictures it was trained on.
    """

    things: dict[str, list[str]]
    others: list[str]
    sizes: list[tuple[int, int]]

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """Every single word of it, in lower case."""
        phrases = [*self.things, *(word for words in self.things.values() for word in words), *self.others]
        return frozenset(word for phrase in phrases for word in split(phrase)) | GRAMMAR

    def knows(self, word: str) -> bool:
        """Whether a word, or what it is the plural of, was in a caption."""
        return any(form in self.words for form in (word, word.removesuffix("s"), word.removesuffix("es")))

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that are in no caption, each once, in their order."""
        return [word for word in dict.fromkeys(split(prompt)) if not self.knows(word)]

    def near(self, word: str) -> list[str]:
        """Known words that are spelled alike."""
        return difflib.get_close_matches(word, sorted(self.words - GRAMMAR), NEAR, 0.7)


def split(text: str) -> list[str]:
    """The words of a text, in lower case, without digits and signs."""
    return re.findall(r"[^\W\d_]+", text.lower())


@functools.lru_cache(maxsize=8)
def vocabulary(source: str) -> Vocabulary | None:
    """Of a model by its folder or hub id; None where it is not said. Raises ModelError for a broken file."""
    file = Path(source) / FILE
    if not file.is_absolute() or not file.is_file():
        return None
    import routers.schema as schema  # `edit --help` reads nothing

    try:
        return schema.decode(
            file.read_bytes(), Vocabulary, f"{str(file)!r} does not list things, others and sizes"
        )
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error


def remarks(source: str, name: str, prompt: str, size: tuple[int | None, int | None]) -> Iterable[str]:
    """One line on words that a model does not know, and one on a size that it was not trained for."""
    known = vocabulary(source)
    if known is None:
        return
    unknown = known.unknown(prompt)
    if unknown:
        near = list(dict.fromkeys(each for word in unknown for each in known.near(word)))
        hint = f"near are {', '.join(near[: 2 * NEAR])}; " if near else ""
        yield (
            f"{name} does not know {', '.join(map(repr, unknown[:8]))} and draws something else; {hint}"
            f"all it knows: edit models {name} --words"
        )
    if None not in size and size not in known.sizes:
        fits = ", ".join(f"{width}x{height}" for width, height in known.sizes)
        yield f"{name} was not trained for {size[0]}x{size[1]} px; the picture may be of nothing, use {fits}"
