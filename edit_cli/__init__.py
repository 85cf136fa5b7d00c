"""The `edit` command, and the same from Python: `edit_cli.generate("a cat").save("cat.png")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_cli.api import Made as Made
    from edit_cli.api import Results as Results
    from edit_cli.api import forget as forget
    from edit_cli.api import generate as generate
    from edit_cli.api import generate_3d as generate_3d

__version__ = "0.1.0"
__all__ = ["Made", "Results", "__version__", "forget", "generate", "generate_3d"]


def __getattr__(name: str) -> Any:
    """From `edit_cli.api`, when it is asked for: `import edit_cli` alone imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("edit_cli.api"), name)
