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
_UNCOUNTABLE = """
    archery, bacon, badminton, bagpipes, ballet shoes, beans, beef, beer, binoculars, blood, blueberries,
    books, bowling, bread, briefs, broccoli, bubbles, butter, camping, candy, cash, cereal, chains,
    champagne, champagne glasses, cheese, cherries, chest of drawers, chocolate, chopsticks, clapping hands,
    clothes, coffee, confetti, corn, crossed fingers, crossed swords, curry, curtains, cycling, dice, dna,
    dollars, dynamite, earth, earthworms, eyeglasses, eyes, fallen leaves, fencing, fire, fireworks,
    flowers, fog, footprints, french fries, fries, garlic, ginger, glasses, gloves, glue, goggles, gold,
    golf, grain, grapes, grass, gymnastics, hay, headphones, hockey, honey, houses, hundred points, ice, ice
    cream, jeans, juice, karate, leaves, lettuce, lightning, lips, lungs, makeup, man and woman, maracas,
    matches, meat, mice, milk, mittens, money, music, musical notes, nesting dolls, noodles, nuts, oatmeal,
    pancakes, pants, paper, pasta, paw prints, paws, peanuts, peas, pliers, popcorn, porridge, prayer beads,
    praying hands, rain, raised hands, rice, rowing, sake, salt, santa, santa claus, scales, scissors,
    sewing, shopping bags, shorts, skiing, skis, snow, snowboarding, soap, socks, soda, spaghetti, sparkles,
    spectacles, stairs, steak, sunglasses, surfing, sushi, sweat drops, swimming, tea, theatre masks,
    thread, thumbs down, thumbs up, thunder, thunderstorm, tools, toothpaste, trees, trousers, two beers,
    two hearts, underpants, underwear, water, wheat, whiskey, whisky, wind, wine, wings, wood, woods, wool,
    yarn, yoga, zzz
"""
UNCOUNTABLE = {" ".join(word.split()) for word in _UNCOUNTABLE.split(",")}
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
