"""What the tests of diffusers build: their pipelines, with stand-ins for what comes from the hub."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.tiny_pipelines import make_tokenizer
from tests.tiny_zoo import CHAT

QWEN_TOKENS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip
"""Special tokens of Qwen models, which their configurations name by number."""

RESIZE = "resize_token_embeddings"
FEW = 64
"""Words of a text encoder that is not made to know more: where its logits are what the transformer takes."""
SIDE, SMALLER = 64, 256
"""Pictures that pipelines make of a megapixel have so many px a side here; areas are divided by so much."""


@dataclass(frozen=True)
class TestClass:
    """A test class of diffusers that says how to build a pipeline."""

    name: str
    of: type

    def build(self) -> Any:
        """The pipeline with random weights."""
        instance = self._instance()
        if "setUp" in vars(self.of):
            instance.setUp()
        pipe = self.of.pipeline_class(**instance.get_dummy_components())  # type: ignore[attr-defined]
        if hasattr(pipe, "resolutions"):
            pipe.resolutions = [(SIDE, SIDE)]
        parts = pipe.components.values()
        words = max(
            (max(part.get_vocab().values()) + 1 for part in parts if hasattr(part, "get_vocab")), default=0
        )
        for part in parts:
            if hasattr(part, RESIZE):  # the stand-ins know more words than the tests' tokenizers
                _know(part, words)
            if hasattr(part, "eval"):
                part.eval()  # text encoders that the hub would have given are made by hand here
        if hasattr(pipe, "prompt_template"):  # so many tokens come before the prompt
            before, words_of = pipe.prompt_template.split("{}")[0], pipe.tokenizer
            ids = getattr(words_of, "tokenizer", words_of)(before)["input_ids"]
            pipe.prompt_template_encode_start_idx = len(ids)
        return pipe.to("cpu")

    def inputs(self, pipe: Any) -> dict[str, Any]:
        """The arguments that the tests call it with."""
        make = self._instance().get_dummy_inputs
        given = dict(make("cpu") if "device" in inspect.signature(make).parameters else make())
        if "use_resolution_binning" in inspect.signature(self.of.pipeline_class.__call__).parameters:  # type: ignore[attr-defined]
            given["use_resolution_binning"] = False  # it would make a megapixel
        if hasattr(pipe, "prompt_template"):  # what comes after the prompt must not be cut
            given["prompt"] = "a cat"
        return given

    def _instance(self) -> Any:
        return self.of.__new__(self.of)


def _know(encoder: Any, words: int) -> None:
    """Let a text encoder read so many words."""
    embedding = encoder.get_input_embeddings()
    known = getattr(embedding, "num_embeddings", words)
    if known < FEW:
        embedding.register_forward_pre_hook(lambda _module, given: (given[0] % known,))
    elif known < words:
        encoder.resize_token_embeddings(words)


def test_classes(checkout: Path) -> Iterator[TestClass]:
    """All of a checkout whose pipeline has a transformer, one for each pipeline class."""
    with ExitStack() as stack:
        for target, name, made in _stand_ins():
            stack.enter_context(patch.object(target, name, made))
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]  # this repository's own
        stack.enter_context(patch.object(sys, "path", [str(checkout), *sys.path]))
        seen: set[str] = set()
        for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
            for made in _of_module(".".join(file.relative_to(checkout).with_suffix("").parts)):
                if made.name not in seen:
                    seen.add(made.name)
                    yield made


def _of_module(module: str) -> Iterator[TestClass]:
    try:
        found = importlib.import_module(module)
    except Exception as error:
        print(f"{module}: {type(error).__name__}: {error}", file=sys.stderr)
        return
    for value in vars(found).values():
        if not isinstance(value, type) or value.__module__ != module:
            continue
        pipeline = inspect.getattr_static(value, "pipeline_class", None)
        if not isinstance(pipeline, type) or not hasattr(value, "get_dummy_components"):
            continue
        if "transformer" in inspect.signature(pipeline.__init__).parameters:  # type: ignore[misc]
            own = next(base for base in pipeline.__mro__ if base.__module__.startswith("diffusers."))
            yield TestClass(own.__name__, value)


def _stand_ins() -> list[tuple[Any, str, Any]]:
    """What to replace: class, attribute, replacement."""
    import transformers
    from transformers import image_processing_utils

    def standing_in(target: Any, make: Any) -> tuple[Any, str, Any]:
        original = target.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            if os.path.isdir(str(name)):
                return original(cls, name, *args, **kwargs)
            return make(cls, str(name))

        return target, "from_pretrained", classmethod(from_pretrained)

    return [
        *_smaller_pictures(),
        standing_in(transformers.PreTrainedTokenizerBase, lambda cls, name: tokenizer(name)),
        standing_in(transformers.AutoTokenizer, lambda cls, name: tokenizer(name)),
        standing_in(transformers.ProcessorMixin, processor),
        standing_in(transformers.AutoProcessor, processor),
        standing_in(transformers.AutoConfig, lambda cls, name: config(transformers.T5Config)),
        standing_in(transformers.PreTrainedModel, lambda cls, name: cls(config(cls.config_class))),
        standing_in(image_processing_utils.BaseImageProcessor, lambda cls, name: cls()),
    ]


def _smaller_pictures() -> Iterator[tuple[Any, str, Any]]:
    """Pipelines that scale any picture to a megapixel scale it to a 256th of that."""
    for name in ("edit", "edit_inpaint", "edit_plus", "layered"):
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        made = module.calculate_dimensions
        yield module, "calculate_dimensions", lambda area, ratio, made=made: made(area / SMALLER, ratio)


@functools.cache
def _words() -> str:
    """What a tokenizer has words for, among others the chat templates of pipelines."""
    import diffusers

    files = sorted((Path(diffusers.__file__).parent / "pipelines").glob("*/pipeline_*.py"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return " ".join(["a cat and a dog in a photo", *(line for line in lines if "<|im_" in line)])


def tokenizer(name: str) -> Any:
    """A byte-level tokenizer, with the numbers of Qwen's special tokens where the name says Qwen."""
    from transformers import Qwen2Tokenizer

    qwen = "qwen" in name.lower()
    made = make_tokenizer(_words() if qwen else "a cat and a dog in a photo")
    if qwen:
        model = json.loads(made.backend_tokenizer.to_str())["model"]
        made = Qwen2Tokenizer(
            vocab={**model["vocab"], **QWEN_TOKENS}, merges=[tuple(merge) for merge in model["merges"]],
            additional_special_tokens=list(QWEN_TOKENS), unk_token="<|endoftext|>", eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        )  # fmt: skip
    if "t5" in name.lower():
        from tokenizers.processors import TemplateProcessing

        end = (made.eos_token, made.eos_token_id)  # T5's, so that an empty text is not nothing
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end[0]}", special_tokens=[end]
        )
    made.model_max_length = 77
    made.chat_template = CHAT
    return made


def processor(cls: Any, name: str) -> Any:
    """A processor of pictures and text without a video part."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from backbones.processors import NoVideo, lenient

    if cls.__name__ == "GlmImageProcessor":
        return _glm_processor(cls, name)
    made = cls if "video_processor" in inspect.signature(cls.__init__).parameters else None
    made, patch = made or transformers.Qwen2VLProcessor, 16 if cls.__name__.startswith("Qwen3") else 14
    least = (2 * patch) ** 2
    pictures = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=4 * least, patch_size=patch)
    return lenient(made)(pictures, tokenizer(name), NoVideo(), chat_template=CHAT)


def _glm_processor(cls: Any, name: str) -> Any:
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    words, named = tokenizer(name), ("image", "grid_bos", "grid_eos")
    words.add_special_tokens({"extra_special_tokens": [f"<|{kind}|>" for kind in named]})
    for kind in named:
        setattr(words, f"{kind}_token", f"<|{kind}|>")
    words.bos_token = words.eos_token
    return cls(GlmImageImageProcessorPil(), words, chat_template=CHAT)


def config(made: Any) -> Any:
    """A tiny configuration of a text encoder: of the sizes that diffusers' dummies have."""
    import transformers

    if issubclass(made, transformers.T5Config):
        return made(
            vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    if "text_config" in getattr(made, "sub_configs", {}):
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        width = 32 if "Gemma" in made.__name__ else 16
        text = {"vocab_size": 152064, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        text |= {"rope_parameters": rope} if "Qwen" in made.__name__ else {}
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return made(text_config=text, vision_config=vision)
    width = 16 if "Llama" in made.__name__ else 32
    return made(hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
