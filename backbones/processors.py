"""Processors of pictures and text whose third part is for videos: loaded without torchvision, which only that
part needs. No pipeline that is run here shows its processor a video.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from backbones.spec import Config


class NoVideo:
    """Stands where a video processor would need torchvision."""


def without_video(index: Config, source: str) -> dict[str, Any]:
    """Loaded components by name: those that cannot be loaded whole. index: `model_index.json`."""
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    import transformers

    loaded = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "transformers":
            continue
        made = getattr(transformers, entry[1], None)
        if isinstance(made, type) and issubclass(made, transformers.ProcessorMixin) and _has_video(made):
            loaded[name] = _load(made, source, name)
    return loaded


def _has_video(made: Any) -> bool:
    return "video_processor" in inspect.signature(made.__init__).parameters


def _load(made: Any, source: str, folder: str) -> Any:
    import transformers

    where = {"subfolder": folder, "local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
    pictures = transformers.AutoImageProcessor.from_pretrained(source, **where)
    return lenient(made)(pictures, tokenizer, NoVideo(), chat_template=tokenizer.chat_template)


def lenient(made: Any) -> Any:
    """The class, content without a video part."""

    def check(processor: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideo):
            return NoVideo
        return made.check_argument_for_proper_class(processor, name, argument)

    return type(made.__name__, (made,), {"check_argument_for_proper_class": check})
