"""Captions for rendered pictures: the words people would type to get each one. Torch-free and seeded."""

import random

from backbones.tiny.recipes.concepts import COMMON_FILE, STYLES

EMPTY_SHARE = 0.10  # captions dropped for classifier-free guidance (Ho & Salimans 2022)
STYLE_SHARE = 0.35  # captions that name their style
TEMPLATES = (
    ("{a}", 60), ("{n}", 45), ("the {n}", 4), ("a picture of {a}", 4), ("a drawing of {a}", 3),
    ("an icon of {a}", 2), ("{n} emoji", 4), ("an emoji of {a}", 2), ("a photo of {a}", 3), ("one {n}", 1),
    ("{n} icon", 2), ("a cute {n}", 2),
)  # fmt: skip
STYLE_TEMPLATES = (("{c}, {s} style", 6), ("{c} in {s} style", 2), ("{s} {c0}", 1), ("{c}, {s}", 1))
UNCOUNTABLE = {
    word.strip()
    for word in ["\n    bread", " fire", " rain", " bacon", " sushi", " popcorn", " chocolate", " candy", " honey", " coffee", " tea", " beer", " wine", " milk", "\n    ice cream", " broccoli", " corn", " money", " snow", " lightning", " cheese", " santa claus", " santa", " grapes", " cherries", "\n    glasses", " scissors", " headphones", " jeans", " socks", " noodles", " french fries", " fries", " footprints", " eyes", " lips", "\n    dice", " earth", " trousers", " pants", " spectacles", " eyeglasses", " mice", " leaves", " spaghetti", " pasta", " rice", " curry", " salt", "\n    butter", " cereal", " porridge", " oatmeal", " lettuce", " garlic", " ginger", " wheat", " grain", " wood", " water", " grass", " soap", "\n    toothpaste", " glue", " paper", " cash", " gold", " soda", " juice", " whisky", " whiskey", " champagne", " sake", " meat", " beef", " steak", "\n    pancakes", " peanuts", " nuts", " beans", " peas", " blueberries", " gloves", " mittens", " shorts", " briefs", " underpants", " underwear", "\n    sunglasses", " goggles", " chopsticks", " books", " dollars", " chains", " pliers", " binoculars", " curtains", " stairs", " matches", "\n    fireworks", " bubbles", " sparkles", " wings", " paws", " paw prints", " flowers", " trees", " houses", " woods", " maracas", " lungs", " scales", " tools", "\n    crossed swords", " musical notes", " skis", " bagpipes", " clothes", " hay", " fog", " wind", " thunder", " ice", " yarn", " wool", " thread", "\n    two beers", " two hearts", " fallen leaves", " man and woman", " clapping hands", " raised hands", " praying hands", "\n    crossed fingers", " prayer beads", " zzz", " dna", " blood", " karate", " golf", " bowling", " badminton", " hockey", " yoga", " archery", "\n    thunderstorm", " earthworms", " sewing", " fencing", " skiing", " surfing", " swimming", " cycling", " snowboarding", " rowing", "\n    gymnastics", " camping", " music", " confetti", " dynamite", " makeup", " ballet shoes", " shopping bags", " champagne glasses", "\n    hundred points", " nesting dolls", " theatre masks", " sweat drops", " chest of drawers", " thumbs up", " thumbs down\n    "]
}  # fmt: skip
COUNTS = ("one", "two", "three", "four", "five")
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "fish": "fish", "sheep": "sheep", "deer": "deer", "man": "men",
    "woman": "women", "child": "children", "tooth": "teeth", "foot": "feet", "knife": "knives",
    "wolf": "wolves", "leaf": "leaves", "shelf": "shelves", "person": "people", "ox": "oxen",
    "squid": "squid", "shrimp": "shrimp", "bison": "bison", "scarf": "scarves", "elf": "elves",
    "bookshelf": "bookshelves", "goldfish": "goldfish", "jellyfish": "jellyfish", "blowfish": "blowfish",
    "cactus": "cactuses", "policeman": "policemen", "snowman": "snowmen", "loaf": "loaves",
    "tropical fish": "tropical fish", "old man": "old men", "old woman": "old women", "moose": "moose",
}  # fmt: skip
_TEMPLATE_NAMES, _TEMPLATE_WEIGHTS = zip(*TEMPLATES, strict=False)
_STYLE_NAMES, _STYLE_WEIGHTS = zip(*STYLE_TEMPLATES, strict=False)


def with_article(words: str, noun: str) -> str:
    """'a cat', 'an apple', 'a red apple', but 'fire' and 'red grapes' stay as they are."""
    if noun in UNCOUNTABLE:
        return words
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "ufo", "eu", "one"))
    return f"{'an' if vowel else 'a'} {words}"


def plural(noun: str) -> str:
    """'cats', 'mice', 'cherries', 'fire engines'."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    head, space, last = noun.rpartition(" ")
    if last in IRREGULAR:
        return head + space + IRREGULAR[last]
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    if last.endswith(("s", "x", "z", "ch", "sh")) or last in ("potato", "tomato", "mango", "volcano"):
        return noun + "es"
    return noun + "s"


def caption(concept: dict, style: int, colour: str | None, rng: random.Random) -> str:
    """One random caption.

    concept: a row of pictures.json (name, synonyms, keywords). style: index into STYLES.
    colour: the recoloured copy's colour name, always said, or None for original art, never said.
    """
    draw = rng.random()
    if draw < 0.34 and concept["synonyms"]:
        noun = rng.choice(concept["synonyms"])
    elif draw < 0.40 and concept["keywords"]:
        noun = rng.choice(concept["keywords"])
    else:
        noun = concept["name"]
    words = f"{colour} {noun}" if colour else noun
    template = rng.choices(_TEMPLATE_NAMES, _TEMPLATE_WEIGHTS)[0]
    text = template.format(a=with_article(words, noun), n=words)
    return finish(text, words, style, rng)


def finish(text: str, words: str, style: int, rng: random.Random) -> str:
    """The caption with, sometimes, its style and a capital. words: what stands after '{style} ...'."""
    if rng.random() < STYLE_SHARE:
        word = rng.choice(list(STYLES.values())[style])
        text = rng.choices(_STYLE_NAMES, _STYLE_WEIGHTS)[0].format(c=text, s=word, c0=words)
    if rng.random() < 0.04:
        text = text[:1].upper() + text[1:]
    return text


def common_prompts() -> list[tuple[str, str]]:
    """The 100 prompts of the quality bar as (prompt, concept name)."""
    lines = [line.strip() for line in COMMON_FILE.read_text("utf-8").splitlines() if line.strip()]
    return [(line, strip_article(line)) for line in lines]


def strip_article(prompt: str) -> str:
    """'a cat' -> 'cat'."""
    first, _, rest = prompt.partition(" ")
    return rest if first in ("a", "an", "the") and rest else prompt
