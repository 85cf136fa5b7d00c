"""How the tokens of a latent set know their places.

A latent set has no order and the DiT no positional encoding, so without help a tiny model spends its hours on
telling tokens apart. The last CODE_CHANNELS channels of every latent hold its place in the box. Two schemes:

free      The places are the noise itself: code channels of the data equal those of the noise, drawn from
          N(0, 1) and mapped to positions by the normal distribution function. The velocity there is
          zero: a token's place is clean at every step of the published sampler, and any number of
          tokens will do.
anchors   A fixed 4 x 4 x 2 grid of places. Noise tokens are matched to places by optimal assignment, and the
          model learns to move each code from its noise to its place.

Shapes: B batch, L latents, C latent channels.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CODE_CHANNELS = 3
SCHEMES = ("free", "anchors")
SPREAD = 0.95  # half side of the cube of positions, box units
ANCHOR_GRID = (4, 4, 2)


def positions(codes: Tensor) -> Tensor:
    """Encoder query positions (B, L, 3) in the box of codes (B, L, 3): uniform for normal codes."""
    return SPREAD * torch.erf(codes / math.sqrt(2))


def anchor_codes() -> Tensor:
    """Codes (32, 3) of the anchor grid: places at the centres of equal cells."""
    axes = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in ANCHOR_GRID]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return math.sqrt(2) * torch.erfinv(grid)


def pair(scheme: str, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, L, 3) of the data that goes with noise (B, L, C), and the noise in the data's token order.

    Raises ValueError on an unknown scheme, or on a token count that is not the anchors'.
    """
    own = noise[..., -CODE_CHANNELS:]
    if scheme == "free":
        return own, noise
    if scheme != "anchors":
        raise ValueError(f"scheme {scheme!r} must be one of {', '.join(SCHEMES)}")
    anchors = anchor_codes()
    if noise.shape[1] != len(anchors):
        raise ValueError(f"scheme anchors needs {len(anchors)} latents, not {noise.shape[1]}")
    cost = torch.cdist(anchors.expand(len(noise), -1, -1), own).square().numpy()
    order = torch.from_numpy(np.stack([linear_sum_assignment(c)[1] for c in cost]))
    matched = noise.gather(1, order[..., None].expand_as(noise))
    return anchors.expand(len(noise), -1, -1), matched
