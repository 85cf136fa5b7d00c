"""Which scenes to compose: several things in one picture, things with coloured parts, and other sizes.
Torch-free.

Everything is seeded, and every scene comes with captions that say what it shows.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from backbones.tiny.recipes import captions
from backbones.tiny.recipes.concepts import COLOURS, Concept
from backbones.tiny.recipes.data import NOT_RECOLOURED

Box = tuple[int, int, int]  # left, top, side in px
CAPTIONS = 4  # per picture
STYLED = 3  # the first three styles appear in scenes
# Where the things stand in a 128 px square, by number of things.
COUNT_BOXES: dict[int, tuple[Box, ...]] = {
    2: ((2, 34, 60), (66, 34, 60)),
    3: ((34, 4, 58), (4, 66, 58), (66, 66, 58)),
    4: ((4, 4, 58), (66, 4, 58), (4, 66, 58), (66, 66, 58)),
    5: ((2, 2, 46), (80, 2, 46), (41, 41, 46), (2, 80, 46), (80, 80, 46)),
}
ABOVE_BOXES: tuple[Box, ...] = ((34, 3, 60), (33, 64, 62))
ONE_AND_TWO: tuple[Box, ...] = ((2, 32, 64), (74, 8, 52), (74, 68, 52))
OTHER_SIZES = ((96, 96), (160, 160), (192, 192), (192, 128), (128, 192), (144, 96), (96, 144))
SUPPORTS = {
    "table", "desk", "chair", "bed", "sofa", "bench", "stool", "armchair", "house", "tree", "car", "truck",
    "carpet", "box", "book", "plate", "hill", "mountain", "rock", "castle", "bridge", "skateboard", "horse",
    "elephant",
    "cloud", "ship", "sailboat", "island", "shelf", "stove", "fence", "wall", "barrel", "cupboard",
}  # fmt: skip
SKIPPED_SECTIONS = {"hearts and symbols", "sky and weather"}  # seldom counted or paired
PART_COLOURS = {name: "#" + "".join(f"{part:02x}" for part in rgb) for name, rgb in COLOURS.items()}


# A drawing, the palette letters of its two coloured parts, and what to call it.
PARTS = (
    ("cottage", ("bB", "rR"), ("a {0} house with a {1} roof", "{0} house with {1} roof",
                               "a house with {0} walls and a {1} roof", "a {0} house and a {1} roof")),
    ("toy_car", ("r", "ky"), ("a {0} car with {1} wheels", "{0} car, {1} wheels")),
    ("potted_flower", ("r", "oO"), ("a {0} flower in a {1} pot", "{0} flower, {1} pot",
                                    "a {1} pot with a {0} flower")),
    ("banded_hat", ("b", "r"), ("a {0} hat with a {1} band", "a {0} hat with a {1} ribbon")),
    ("dotted_ball", ("r", "x"), ("a {0} ball with {1} dots", "a {0} ball with {1} spots")),
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One thing to paint: a concept's index, its colour name or None, and where it stands."""

    concept: int
    colour: str | None
    box: Box


@dataclass(frozen=True)
class Scene:
    """A picture to compose. parts: a drawing and its letters' colours, instead of things."""

    size: tuple[int, int]
    style: int
    things: tuple[Thing, ...]
    texts: tuple[str, ...]
    parts: tuple[str, tuple[tuple[str, str], ...]] | None = None


class Planner:
    """Draws scenes at random, seeded."""

    def __init__(self, concepts: list[Concept], seed: int):
        self.rng, self.concepts = random.Random(seed), concepts
        things = [
            number for number, concept in enumerate(concepts)
            if concept.section not in SKIPPED_SECTIONS and concept.name not in captions.UNCOUNTABLE
        ]  # fmt: skip
        self.things = things
        # The first part of the file holds the commonest words.
        self.weights = [3.0 if number < 308 else 1.0 for number in things]
        self.colourable = [n for n in things if concepts[n].name not in NOT_RECOLOURED and
                           not {"people", "body", "faces"} & set(concepts[n].section.split())]  # fmt: skip
        self.supports = [n for n, concept in enumerate(concepts) if concept.name in SUPPORTS]

    def thing(self) -> int:
        """A random concept to compose with."""
        return self.rng.choices(self.things, self.weights)[0]

    def two(self) -> tuple[int, int]:
        """Two different concepts."""
        first = self.thing()
        while (second := self.thing()) == first:
            pass
        return first, second

    def noun(self, concept: int) -> str:
        """The concept's name, or now and then a synonym."""
        synonyms = self.concepts[concept].synonyms
        return (
            self.rng.choice(synonyms) if synonyms and self.rng.random() < 0.2 else self.concepts[concept].name
        )

    def a(self, concept: int, colour: str | None = None) -> str:
        """'a red cat'."""
        noun = self.noun(concept)
        return captions.with_article(f"{colour} {noun}" if colour else noun, noun)

    def texts(self, make, style: int) -> tuple[str, ...]:
        """Captions of one picture. make: returns a fresh caption."""
        texts = [(text := make(), captions.finish(text, text, style, self.rng))[1] for _ in range(CAPTIONS)]
        return tuple(texts)

    def scene(self, style: int, things: list[Thing], make, size: tuple[int, int] = (128, 128)) -> Scene:
        """A scene with captions that `make` draws."""
        return Scene(size, style, tuple(things), self.texts(make, style))

    def count(self, number: int, coloured: bool) -> Scene:
        """'three cats', 'two red apples'."""
        concept = self.rng.choice(self.colourable) if coloured else self.thing()
        colour = self.rng.choice(list(COLOURS)) if coloured else None

        def make() -> str:
            nouns = captions.plural(self.noun(concept))
            words = f"{colour} {nouns}" if colour else nouns
            word = captions.COUNTS[number - 1] if self.rng.random() < 0.85 else str(number)
            return f"{word} {words}"

        things = [Thing(concept, colour, box) for box in COUNT_BOXES[number]]
        return self.scene(self.rng.randrange(STYLED), things, make)

    def pair(self, coloured: bool = False, size: tuple[int, int] = (128, 128)) -> Scene:
        """'a cat and a dog', 'a red apple and a green pear', side by side."""
        first, second = self.rng.sample(self.colourable, 2) if coloured else self.two()
        left, right = self.rng.sample(list(COLOURS), 2) if coloured else (None, None)
        words = (
            ("and", "and", "and", "and", "next to", "with", "beside", "left of") if not coloured else ("and",)
        )

        def make() -> str:
            text = f"{self.a(first, left)} {self.rng.choice(words)} {self.a(second, right)}"
            return text.replace("left of", "to the left of")

        boxes = COUNT_BOXES[2] if size == (128, 128) else ((4, 18, 90), (98, 18, 90))
        things = [Thing(first, left, boxes[0]), Thing(second, right, boxes[1])]
        return self.scene(self.rng.randrange(STYLED), things, make, size)

    def above(self) -> Scene:
        """'a cat on a chair', 'a sun above a house'."""
        top, bottom = self.two()
        if self.rng.random() < 0.6:
            bottom = self.rng.choice(self.supports)
        words = ("on", "on", "on", "on top of", "above", "over")

        def make() -> str:
            if self.rng.random() < 0.2:
                return f"{self.a(bottom)} {self.rng.choice(('under', 'below'))} {self.a(top)}"
            return f"{self.a(top)} {self.rng.choice(words)} {self.a(bottom)}"

        things = [Thing(top, None, ABOVE_BOXES[0]), Thing(bottom, None, ABOVE_BOXES[1])]
        return self.scene(self.rng.randrange(STYLED), things, make)

    def one_and_two(self) -> Scene:
        """'a table and two chairs'."""
        first, second = self.two()

        def make() -> str:
            return f"{self.a(first)} and two {captions.plural(self.noun(second))}"

        things = [Thing(first, None, ONE_AND_TWO[0]), *(Thing(second, None, box) for box in ONE_AND_TWO[1:])]
        return self.scene(self.rng.randrange(STYLED), things, make)

    def part(self) -> Scene:
        """'a blue house with a red roof'."""
        (drawing, letters, frames) = self.rng.choice(PARTS)
        colours = self.rng.sample(list(COLOURS), 2)
        style = self.rng.randrange(STYLED)
        paint = tuple(
            (letter, PART_COLOURS[colours[number]])
            for number, group in enumerate(letters)
            for letter in group
        )
        texts = self.texts(
            lambda: self.rng.choice(frames).format(*colours).replace("a orange", "an orange"), style
        )
        return Scene((128, 128), style, (), texts, (drawing, paint))

    def single(self, concept: int, style: int, size: tuple[int, int]) -> Scene:
        """One thing that fills a picture of another size."""
        side = round(min(size) * 116 / 128)
        box = ((size[0] - side) // 2, (size[1] - side) // 2, side)
        row = {
            "name": self.concepts[concept].name,
            "synonyms": self.concepts[concept].synonyms,
            "keywords": (),
        }
        texts = tuple(captions.caption(row, style, None, self.rng) for _ in range(CAPTIONS))
        return Scene(size, style, (Thing(concept, None, box),), texts)

    def plan(self, scale: float) -> Iterator[Scene]:
        """Every scene of the data set; scale multiplies their number."""
        kinds = {
            lambda: self.pair(): 3600, lambda: self.above(): 1500, lambda: self.pair(coloured=True): 1500,
            lambda: self.one_and_two(): 500, lambda: self.part(): 600,
            lambda: self.pair(size=(192, 128)): 400,
        }  # fmt: skip
        for number in COUNT_BOXES:
            kinds[lambda number=number: self.count(number, False)] = 850
            kinds[lambda number=number: self.count(number, True)] = 200
        for make, count in kinds.items():
            for _ in range(round(count * scale)):
                yield make()
        for number, size in enumerate(OTHER_SIZES):
            for concept in range(len(self.concepts)):
                if self.rng.random() < scale * (0.65 if size[0] * size[1] > 128 * 192 else 0.9):
                    yield self.single(concept, (concept + number) % STYLED, size)
