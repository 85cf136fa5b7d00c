"""LoKr and LoHa as LoRA: what they add to a layer's weights, exactly, as two matrices. Torch-free.

A LoKr adds a Kronecker product to a layer, a LoHa an elementwise product of two matrices of low rank. Both
are `up @ down` of a LoRA with a larger rank, the product of theirs and never more than the layer's smaller
side, which loads, scales, mixes and leaves the model's own weights alone as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = {
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}
"""The parts of their layers that are read, beside `alpha`."""
MARKS = (".lokr_", ".hada_")
PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lycoris_",
    "lora_unet_",
    "lora_transformer_",
)
"""What names of layers begin with, by who wrote the file; some have _ for every dot."""


def is_lycoris(names: Any) -> bool:
    """Whether weights of these names are of a LoKr or LoHa."""
    return any(mark in name for name in names for mark in MARKS)


def as_lora(weights: dict[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """The same change as a LoRA, by names that diffusers knows: lora_A [r, in] and lora_B [out, r] of each.

    Layers that the transformer does not have keep their names. Raises ValueError, which says what, for parts
    that are not read, or do not belong together.
    """
    modules = {name.replace(".", "_"): name for name, _ in transformer.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        layers.setdefault(layer, {})[part] = value
    made = {}
    for layer, parts in layers.items():
        plain = layer
        for prefix in PREFIXES:
            plain = plain.removeprefix(prefix)
        path = f"transformer.{modules.get(plain.replace('.', '_'), plain)}"
        down, up = _matrices(layer, parts)
        made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = down, up
    return made


def _matrices(layer: str, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Matrices down [r, in] and up [out, r], their scale in the second."""
    unread = sorted(set(parts) - {"alpha", *KINDS["LoKr"], *KINDS["LoHa"]})
    if unread:
        raise ValueError(f"layer {layer} holds {unread[0]!r}, which is not read")
    own = {name: value.float() for name, value in parts.items()}
    wrong = [name for name, value in own.items() if name != "alpha" and value.dim() != 2]
    if wrong:
        raise ValueError(f"layer {layer} is no linear one: its {wrong[0]!r} is no matrix")
    alpha = float(own["alpha"]) if "alpha" in own else None
    try:
        down, up, rank = _of_loha(own) if "hada_w1_a" in own else _of_lokr(own)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"layer {layer} is not whole: {str(error).splitlines()[0]}") from error
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    dtype = next(value.dtype for name, value in parts.items() if name != "alpha")
    return down.to(dtype).contiguous(), (up * scale).to(dtype).contiguous()


def _of_lokr(own: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """Both matrices, and the rank that alpha is a multiple of, None where both factors are whole."""
    import torch

    (up1, down1, rank1), (up2, down2, rank2) = (_factor(own, name) for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(down1, down2), torch.kron(up1, up2), rank2 or rank1


def _factor(own: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, int | None]:
    """A matrix as up @ down, of its lower rank where it is given as one; the rank."""
    if name in own:
        return (*_thin(own[name]), None)
    up, down = own[f"{name}_a"], own[f"{name}_b"]
    rank = len(down)
    return (up, down, rank) if rank <= min(len(up), down.shape[1]) else (*_thin(up @ down), rank)


def _thin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as up @ down: itself, and the identity on its smaller side."""
    import torch

    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows < columns else (matrix, torch.eye(columns))


def _of_loha(own: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """As of a LoKr. (a b) * (c d) is a sum over pairs of their ranks."""
    up1, down1, up2, down2 = (own[name] for name in KINDS["LoHa"])
    rank, pairs = len(down1), len(down1) * len(down2)
    if pairs > min(len(up1), down1.shape[1]):
        up, down = _thin((up1 @ down1) * (up2 @ down2))
        return down, up, rank
    up = (up1[:, :, None] * up2[:, None, :]).reshape(len(up1), pairs)
    down = (down1[:, None, :] * down2[None, :, :]).reshape(pairs, down1.shape[1])
    return down, up, rank
