"""Guesses at the arguments of one call of a transformer that is known by its class and config alone.

Names of arguments and of config entries mean much the same throughout diffusers, so most transformers can be
called without knowing the model: latents come as tokens, images or videos, texts as `[B, L, D]` with D in the
config. Where a guess has several answers (the layout of the latents, the width of the text) each is tried.
What no rule covers is not guessed: packed sequences, key-value caches, reference images.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """How large the call is: rows, latent frames, height and width, text tokens.

    own: whether a size that the config names wins, as where only the structure matters.
    """

    rows: int = 2
    frames: int = 3
    height: int = 16
    width: int = 16
    text: int = 7
    own: bool = True


class Config(dict[str, Any]):
    """A transformer's config, and the sizes of the call."""

    def __init__(self, config: Mapping[str, Any], sizes: Sizes) -> None:
        super().__init__(config)
        self.sizes = sizes


CHANNELS = (
    "audio_acoustic_hidden_dim",
    "in_channels",
    "in_visual_dim",
    "io_channels",
    "latent_channels",
    "latent_dim",
    "embedding_dim",
)
TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "in_text_dim",
    "text_hidden_dim",
    "cap_feat_dim",
    "context_in_dim",
    "cross_attention_input_dim",
    "cond_token_dim",
    "text_in_dim",
    "dit_text_dim",
    "condition_dim",
    "encoder_hidden_size",
    "encoder_hidden_states_channels",
    "cross_attention_dim",
    "embedding_dim",
    "hidden_size",
)
TEXT_LENGTHS = ("num_embeddings", "max_text_seq_length", "max_sequence_length", "text_len")
POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2", "text_emb_dim", "global_cond_dim")
OPTIONAL = (
    "timestep",
    "timesteps",
    "encoder_hidden_states",
    "pooled_projections",
    "global_hidden_states",
    "guidance",
    "img_ids",
    "txt_ids",
    "class_labels",
    "img_shapes",
    "num_frames",
    "height",
    "width",
    "control_hidden_states",
    "audio_hidden_states",
    "added_cond_kwargs",
    "cross_attention_kwargs",
    "return_dict",
)
"""Arguments with a default that models need all the same."""


def typical_calls(
    transformer: nn.Module, settings: Mapping[str, Any], sizes: Sizes | None = None
) -> Iterator[dict[str, Any]]:
    """Arguments of a call on the meta device, most likely first. None if an argument cannot be guessed.

    settings: the transformer's config. sizes: by default small ones.
    """
    config = Config(settings, sizes or Sizes())
    channels = next((config[name] for name in CHANNELS if isinstance(config.get(name), int)), None)
    if channels is None:
        return
    widths = [config[name] for name in TEXT_WIDTHS if isinstance(config.get(name), int)] or [1]
    parameters = list(inspect.signature(type(transformer).forward).parameters.values())[1:]
    with torch.device("meta"):
        for sample, width in product(_samples(channels, config), dict.fromkeys(widths)):
            wanted = [p for p in parameters if p.default is p.empty or p.name in OPTIONAL]
            call = {p.name: _argument(p.name, sample, width, config) for p in wanted}
            missing = [p.name for p in wanted if call[p.name] is None and p.default is p.empty]
            if not missing:
                yield {name: value for name, value in call.items() if value is not None}


def _samples(channels: int, config: Config) -> list[Any]:
    """The layouts of latents: tokens, image, video (three ways), signal, one image a row."""
    sizes = config.sizes
    tokens = sizes.height * sizes.width // 4
    side: tuple[Any, Any] = (sizes.height, sizes.width)
    frames = sizes.frames
    if sizes.own:
        size = config.get("sample_size") if isinstance(config.get("sample_size"), int) else sizes.height
        side = config.get("sample_height", size), config.get("sample_width", size)
        frames = config.get("video_length", frames)
    shapes = [
        (tokens, channels),
        (channels, *side),
        (channels, frames, *side),
        (frames, channels, *side),
        (frames, *side, channels),
        (channels, tokens),
        (channels,),
    ]
    tensors: list[Any] = [torch.empty(sizes.rows, *shape, device="meta") for shape in shapes]
    listed = [torch.empty(channels, 1, *side, device="meta") for _ in range(sizes.rows)]
    return [*tensors, listed]


def _argument(name: str, sample: Any, width: int, config: Config) -> Any:
    """One argument by its name; None if it is left out."""
    rule = _RULES.get(name)
    if rule is not None:
        return rule(sample, width, config)
    if name.endswith("mask") and name != "attention_mask":
        return torch.ones(config.sizes.rows, _text_length(config), dtype=torch.bool)
    return None


def _text_length(config: Config) -> int:
    return next(
        (config[name] for name in TEXT_LENGTHS if isinstance(config.get(name), int)), config.sizes.text
    )


def _control(sample: Any, _width: int, config: Config) -> Tensor | None:
    channels = config.get("vace_in_channels")
    return (
        sample.new_empty(config.sizes.rows, channels, *sample.shape[2:])
        if channels and _is(sample, 5)
        else None
    )


def _global(_sample: Any, _width: int, config: Config) -> Tensor | None:
    width = config.get("global_states_input_dim")
    return torch.empty(config.sizes.rows, 1, width) if width else _pooled(_sample, _width, config)


def _context(sample: Any, _width: int, config: Config) -> Tensor | None:
    if not _is(sample, 3) or "in_channels" not in config:
        return None
    return torch.empty(*sample.shape[:2], max(config["in_channels"] - sample.shape[2], 0))


def _audio(_sample: Any, _width: int, config: Config) -> Tensor | None:
    channels = config.get("in_audio_dim")
    return torch.empty(config.sizes.rows, config.sizes.text, channels) if channels else None


def _pooled(_sample: Any, _width: int, config: Config) -> Tensor | None:
    sizes = [config[name] for name in POOLED_WIDTHS if isinstance(config.get(name), int)]
    return torch.empty(config.sizes.rows, sizes[0]) if sizes else None


def _guidance(_sample: Any, _width: int, config: Config) -> Tensor | None:
    return torch.empty(config.sizes.rows) if config.get("guidance_embeds") else None


def _axes(config: Config) -> int:
    return len(config.get("axes_dims_rope") or (0, 0, 0))


def _image_ids(sample: Any, _width: int, config: Config) -> Tensor | None:
    return torch.empty(sample.shape[1], _axes(config)) if isinstance(sample, Tensor) else None


def _text_ids(_sample: Any, _width: int, config: Config) -> Tensor:
    return torch.empty(_text_length(config), _axes(config))


def _text(_sample: Any, width: int, config: Config) -> Tensor:
    return torch.empty(config.sizes.rows, _text_length(config), width)


def _listed_text(_sample: Any, width: int, config: Config) -> list[Tensor]:
    return [torch.empty(config.sizes.text, width) for _ in range(config.sizes.rows)]


def _sizes(_sample: Any, _width: int, config: Config) -> Tensor:
    return torch.empty(config.sizes.rows, 2)


def _is(sample: Any, axes: int) -> bool:
    return isinstance(sample, Tensor) and sample.dim() == axes


_RULES: dict[str, Any] = {
    "hidden_states": lambda sample, width, config: sample,
    "x": lambda sample, width, config: sample,
    "timestep": lambda sample, width, config: torch.empty(config.sizes.rows),
    "timesteps": lambda sample, width, config: torch.empty(config.sizes.rows),
    "t": lambda sample, width, config: torch.empty(config.sizes.rows),
    "timestep_r": lambda sample, width, config: torch.empty(config.sizes.rows),
    "encoder_hidden_states": _text,
    "encoder_hidden_states_t5": _text,
    "cap_feats": _listed_text,
    "proj_embedding": lambda sample, width, config: torch.empty(config.sizes.rows, width),
    "class_labels": lambda sample, width, config: torch.zeros(config.sizes.rows, dtype=torch.long),
    "pooled_projections": _pooled,
    "global_hidden_states": _global,
    "context_latents": _context,
    "control_hidden_states": _control,
    "audio_hidden_states": _audio,
    "visual_rope_pos": lambda sample, width, config: tuple(
        torch.arange(n) for n in (config.sizes.frames, config.sizes.height // 2, config.sizes.width // 2)
    ),
    "text_rope_pos": lambda sample, width, config: torch.arange(_text_length(config)),
    "text_bth": _text,
    "text_lens": lambda sample, width, config: torch.ones(config.sizes.rows, dtype=torch.long),
    "guidance": _guidance,
    "img_ids": _image_ids,
    "txt_ids": _text_ids,
    "original_size": _sizes,
    "target_size": _sizes,
    "crop_coords": _sizes,
    "img_shapes": lambda sample, width, config: (
        [[(1, config.sizes.height // 2, config.sizes.width // 2)]] * config.sizes.rows
    ),
    "num_frames": lambda sample, width, config: 1 if _is(sample, 3) else config.sizes.frames,
    "height": lambda sample, width, config: config.sizes.height // 2,
    "width": lambda sample, width, config: config.sizes.width // 2,
    "added_cond_kwargs": lambda sample, width, config: {"resolution": None, "aspect_ratio": None},
    "cross_attention_kwargs": lambda sample, width, config: {},
    "return_dict": lambda sample, width, config: False,
}
