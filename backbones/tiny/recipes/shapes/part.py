"""What builders of solids work with: coloured parts, and seeded random proportions and colours."""

import colorsys
import random
from collections.abc import Callable

from backbones.tiny.recipes.shapes.sdf import Field

Colour = tuple[float, float, float]  # sRGB in [0, 1]
Part = tuple[Field, Colour]
Builder = Callable[["Draw"], list[Part]]


class Draw:
    """Seeded random proportions and colours for the builders."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)

    def __call__(self, low: float, high: float) -> float:
        """A uniform number."""
        return self.rng.uniform(low, high)

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.rng.randint(low, high)

    def flip(self, share: float = 0.5) -> bool:
        """True with this probability."""
        return self.rng.random() < share

    def colour(self) -> Colour:
        """Any clear colour; now and then a grey."""
        if self.flip(0.12):
            grey = self(0.25, 0.9)
            return (grey, grey, grey)
        return colorsys.hsv_to_rgb(self(0, 1), self(0.45, 0.95), self(0.5, 0.98))

    def near(self, hue: float, saturation: float, value: float) -> Colour:
        """A colour close to the named one; one in six is any colour."""
        if self.flip(1 / 6):
            return self.colour()
        return colorsys.hsv_to_rgb(
            (hue + self(-0.04, 0.04)) % 1,
            min(1.0, saturation * self(0.8, 1.2)),
            min(1.0, value * self(0.8, 1.2)),
        )

    def wood(self) -> Colour:
        """Browns."""
        return self.near(0.08, 0.6, 0.6)

    def leaf(self) -> Colour:
        """Greens."""
        return self.near(0.32, 0.65, 0.6)

    def steel(self) -> Colour:
        """Greys."""
        return self.near(0.6, 0.08, 0.65)
