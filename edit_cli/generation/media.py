"""Which medium a model has, among those that one command makes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from backbones.spec import Backbone, Makes
from edit_cli.generation.medium import Medium
from edit_cli.generation.sound import SOUND
from edit_cli.generation.video import VIDEO

PROMPTED: Mapping[Makes, Medium] = {"video": VIDEO, "sound": SOUND}
"""What `edit generate` makes besides pictures."""


def medium_for(backbone: Backbone, medium: Medium) -> Medium:
    """The model's medium. medium: the command's."""
    return PROMPTED.get(backbone.makes, medium)
