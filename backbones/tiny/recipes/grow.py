"""Begin training with the weights of a smaller qwen-image-tiny: more blocks, and another tokenizer's words.

The grown model computes what the smaller one did (for words whose tokens it knew), so that nothing learnt
is lost: added blocks are copies whose gates are shut, and a new token's embedding is the mean of the tokens
that the old tokenizer cuts it into (net2net, Chen et al. 2016, arXiv 1511.05641).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer


def spread(old: int, new: int) -> list[int]:
    """For each of `new` blocks the old block it is, or minus one minus the old block it copies with shut
    gates.

    Copies follow their originals, evenly spread.
    """
    extra = new - old
    copied = {round((number + 1) * old / (extra + 1)) - 1 for number in range(extra)}
    order = [step for block in range(old) for step in ([block, -1 - block] if block in copied else [block])]
    if len(order) != new:
        raise ValueError(f"{old} blocks cannot grow to {new}: at most one copy of each")
    return order


def shut(name: str, value: Tensor) -> Tensor:
    """A modulation's weight or bias with both gates zero: the third and sixth part of six."""
    if "_mod." not in name:
        return value.clone()
    parts = list(value.chunk(6))
    parts[2], parts[5] = torch.zeros_like(parts[2]), torch.zeros_like(parts[5])
    return torch.cat(parts)


def grown_blocks(
    weights: dict[str, Tensor],
    new: int,
    prefix: str = "transformer_blocks.",
    shut: Callable[[str, Tensor], Tensor] = shut,
) -> dict[str, Tensor]:
    """A transformer's weights with `new` blocks below `prefix`. The function stays the same.

    shut: gives a copied block's weight, by its name within the block, such that the block adds nothing.
    """
    old = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith(prefix))
    result = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for number, source in enumerate(spread(old, new)):
        block = source if source >= 0 else -1 - source
        for name, value in weights.items():
            if name.startswith(f"{prefix}{block}."):
                rest = name.split(".", 2)[2]
                result[f"{prefix}{number}.{rest}"] = shut(rest, value) if source < 0 else value
    return result


def grown_embedding(old: Tensor, old_tokens: Any, new_tokens: Any) -> Tensor:
    """Embeddings (new vocabulary, D) from those of another tokenizer."""
    special = set(new_tokens.all_special_tokens)
    rows = []
    for token in new_tokens.convert_ids_to_tokens(range(len(new_tokens))):
        known = old_tokens.convert_tokens_to_ids(token)
        if known is not None and (token in special or token in old_tokens.get_vocab()):
            rows.append(old[known])
            continue
        text = new_tokens.convert_tokens_to_string([token])
        pieces = old_tokens(text, add_special_tokens=False).input_ids
        rows.append(old[pieces].mean(0) if pieces else old.mean(0))
    return torch.stack(rows)


def grow(model: nn.Module, folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Fill a TinyModel with the weights of a pipeline folder, grown."""
    dit = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").float()
    text = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").float()
    model.dit.load_state_dict(grown_blocks(dit.state_dict(), len(model.dit.transformer_blocks)))
    words = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    embedding = grown_embedding(text.get_input_embeddings().weight.detach(), words, tokenizer)
    weights = text.state_dict()
    for name in [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        weights[name] = embedding
    model.text.load_state_dict(weights)
    print(f"dit: begins with {folder}, {len(dit.transformer_blocks)} blocks", flush=True)
