"""The core concepts: which picture each word means, and in which tier it is trained. Torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CONCEPTS_FILE = HERE / "concepts.txt"
COMMON_FILE = HERE.parent / "prompts" / "common100.txt"

# Icon-set prefix -> the words that ask for its style in a caption.
STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto", "noto", "glossy"),
    "fluent-emoji-flat": ("flat", "flat", "fluent"),
    "twemoji": ("twemoji", "twemoji", "twitter"),
}
# Colour name -> sRGB target of a recoloured picture (0-255).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 48),
    "orange": (248, 138, 24),
    "yellow": (252, 208, 46),
    "green": (62, 168, 62),
    "blue": (44, 112, 226),
    "purple": (138, 66, 196),
    "pink": (246, 128, 186),
    "brown": (134, 82, 44),
    "black": (52, 52, 58),
}


@dataclass(frozen=True)
class Concept:
    """One thing that can be asked for.

    name: the plain English name, as in "a cat". emoji: the character whose picture it is.
    synonyms: hand-chosen words that mean the same picture. keywords: emojilib keywords that no other
    core concept has (filled in by `add_keywords`).
    """

    name: str
    emoji: str
    synonyms: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """Lower-case code points without the variation selector, the key of iconify's chars.json."""
        return "-".join(f"{ord(c):x}" for c in self.emoji if ord(c) != 0xFE0F)


def load_concepts(path: Path = CONCEPTS_FILE) -> list[Concept]:
    """Read `emoji | name | synonym, synonym` lines; '#' starts a comment. ValueError names a bad line."""
    concepts: list[Concept] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != 3:
            raise ValueError(f"{path.name}:{number}: expected 'emoji | name | synonyms', got {line!r}")
        synonyms = tuple(word.strip() for word in fields[2].split(",") if word.strip())
        concepts.append(Concept(fields[1], fields[0], synonyms))
    names = [concept.name for concept in concepts]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(f"{path.name}: concept names must be unique, repeated: {sorted(doubled)}")
    return concepts


def add_keywords(concepts: list[Concept], packages: Path) -> list[Concept]:
    """Add emojilib keywords and emoji-datasource short names that point at exactly one core concept.

    packages: the node_modules folder with both packages. Only their JSON names are read, never pictures.
    """
    emojilib = json.loads((packages / "emojilib/dist/emoji-en-US.json").read_text("utf-8"))
    words_of = {char.replace("\ufe0f", ""): words for char, words in emojilib.items()}
    short_names = {
        (row["non_qualified"] or row["unified"]).lower().replace("-fe0f", ""): row["short_names"]
        for row in json.loads((packages / "emoji-datasource/emoji.json").read_text("utf-8"))
    }
    candidates: list[set[str]] = []
    for concept in concepts:
        words = list(words_of.get(concept.emoji.replace("\ufe0f", ""), [])) + list(
            short_names.get(concept.code, [])
        )
        words = {word.replace("_", " ").replace("-", " ").lower().strip() for word in words}
        candidates.append(
            {word for word in words if word.replace(" ", "").isalpha() and len(word.split()) <= 3}
        )
    taken = {word for concept in concepts for word in (concept.name, *concept.synonyms)}
    extended = []
    for index, concept in enumerate(concepts):
        others = set().union(*(candidates[:index] + candidates[index + 1 :]))
        unique = sorted(word for word in candidates[index] - others - taken if len(word) > 2)
        extended.append(Concept(concept.name, concept.emoji, concept.synonyms, tuple(unique)))
    return extended
