"""From a request to pictures, meshes, videos and sounds. `edit_cli.generate(...)` calls it: see `api.py`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package and the function of the same name: Python has one attribute for both."""

    def __call__(self, prompt: Any = (), **options: Any) -> Any:
        return import_module("edit_cli.api").make("generate", prompt, options)


sys.modules[__name__].__class__ = _Callable
