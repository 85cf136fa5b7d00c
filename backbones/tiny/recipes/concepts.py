"""The core concepts: which pictures each word means. Torch-free."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
CONCEPTS_FILE = HERE / "concepts.txt"
COMMON_FILE = HERE.parent / "prompts" / "common100.txt"

# Icon-set prefix -> the words that ask for its style in a caption.
STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto", "noto", "glossy"),
    "fluent-emoji-flat": ("flat", "flat", "fluent"),
    "twemoji": ("twemoji", "twemoji", "twitter"),
    "fluent-emoji": ("shaded", "shaded", "3d"),
}
# How often a caption without a style word means each style.
STYLE_WEIGHTS = (0.34, 0.27, 0.27, 0.12)
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
    "white": (238, 240, 243),
    "grey": (150, 156, 164),
}


@dataclass(frozen=True)
class Concept:
    """One thing that can be asked for.

    name: the plain English name, as in "a cat". emoji: the character whose picture it is; empty if there is
    none. synonyms: hand-chosen words that mean the same picture. keywords: emojilib keywords that no other
    core concept has (filled in by `add_keywords`). art: the picture, if there is no emoji: `own:drawing` or
    `set:icon`. section: the file's heading above it.
    """

    name: str
    emoji: str
    synonyms: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    art: str = ""
    section: str = ""

    @property
    def code(self) -> str:
        """Lower-case code points without the variation selector, the key of iconify's chars.json."""
        return "-".join(f"{ord(c):x}" for c in self.emoji if ord(c) != 0xFE0F)


def load_concepts(path: Path = CONCEPTS_FILE) -> list[Concept]:
    """Read `emoji | name | synonym, synonym | art art` lines below `# section` lines.

    Art may be missing; '-' stands for no emoji. ValueError names a bad line.
    """
    concepts: list[Concept] = []
    section = ""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("#"):
            section = line.lstrip("# ").removeprefix("more ")
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("|")]
        if len(fields) not in (3, 4):
            raise ValueError(f"{path.name}:{number}: expected 'emoji | name | synonyms | art', got {line!r}")
        emoji = "" if fields[0] == "-" else fields[0]
        art = fields[3] if len(fields) == 4 else ""
        if not emoji and not art:
            raise ValueError(f"{path.name}:{number}: {fields[1]!r} has neither an emoji nor art")
        synonyms = tuple(word.strip() for word in fields[2].split(",") if word.strip())
        concepts.append(Concept(fields[1], emoji, synonyms, art=art, section=section))
    words = [word for concept in concepts for word in (concept.name, *concept.synonyms)]
    doubled = sorted(word for word, count in Counter(words).items() if count > 1)
    if doubled:
        raise ValueError(f"{path.name}: a word may mean one concept only, repeated: {doubled}")
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
        names = [*words_of.get(concept.emoji.replace("\ufe0f", ""), []), *short_names.get(concept.code, [])]
        words = {word.replace("_", " ").replace("-", " ").lower().strip() for word in names if concept.emoji}
        candidates.append(
            {word for word in words if word.replace(" ", "").isalpha() and len(word.split()) <= 3}
        )
    taken = {word for concept in concepts for word in (concept.name, *concept.synonyms)}
    uses = Counter(word for words in candidates for word in words)
    return [
        replace(concept, keywords=tuple(sorted(w for w in words - taken if len(w) > 2 and uses[w] == 1)))
        for concept, words in zip(concepts, candidates, strict=True)
    ]
