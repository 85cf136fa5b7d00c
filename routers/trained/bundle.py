"""What `calibrate --method train` adds to a bundle: routers, their profile, and weights of the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .backbone import FILE, BackboneFile, BackboneWeights
from .policy import Array, Profile
from .router import build_router


@dataclass
class Trained:
    """routers: the tensors of each block's. profile: what they spend at each step. trend [N]: how far closed
    blocks continue what they added before; None: they add nothing. backbone: weights trained with them, or
    None.
    """

    routers: list[dict[str, Tensor]]
    profile: Profile
    trend: Array | None = None
    backbone: BackboneWeights | None = None

    @classmethod
    def read(cls, path: str | Path, backbone: BackboneFile | None, tensors: Mapping[str, Tensor]) -> Trained:
        """From a bundle's place, what it says of the backbone, and its tensors. Raises ValueError."""
        routers: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(f"{key} holds values that are not finite")
            if key.startswith("routers."):
                index, _, name = key.removeprefix("routers.").partition(".")
                routers.setdefault(index, {})[name] = value
        numbers = [str(i) for i in range(len(routers))]
        if not routers or set(numbers) != set(routers):
            raise ValueError(f"it has routers for blocks {sorted(routers)}")
        try:
            budgets, spend = (tensors[f"profile.{name}"].double().numpy() for name in ("budgets", "spend"))
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from None
        first = tensors["profile.first"].double().numpy() if "profile.first" in tensors else None
        profile, each = Profile(budgets, spend, first), [routers[i] for i in numbers]
        if first is not None and first.shape[1] != len(each):
            raise ValueError(f"profile.first {list(first.shape)} is not of {len(each)} blocks")
        for number, state in enumerate(each):
            try:
                build_router(state)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:  # noqa: PERF203 - names the block
                raise ValueError(f"routers.{number} is not a router's weights: {error!r:.200}") from None
        trend = tensors["profile.trend"].double().numpy() if "profile.trend" in tensors else None
        if trend is not None and trend.shape != (len(each),):
            raise ValueError(
                f"profile.trend {list(trend.shape)} is not one value for each of {len(each)} blocks"
            )
        weights = None if backbone is None else BackboneWeights.read(Path(path), backbone)
        return cls(each, profile, trend, weights)

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the bundle's file of tensors."""
        return {
            **{f"routers.{i}.{k}": v.contiguous() for i, r in enumerate(self.routers) for k, v in r.items()},
            "profile.budgets": torch.from_numpy(self.profile.budgets),
            "profile.spend": torch.from_numpy(self.profile.spend),
            **({} if self.profile.first is None else {"profile.first": torch.from_numpy(self.profile.first)}),
            **({} if self.trend is None else {"profile.trend": torch.from_numpy(self.trend)}),
        }

    def description(self) -> dict[str, Any]:
        """JSON data. `per_sample` is for versions that also knew routers beside plans."""
        backbone = None if self.backbone is None else self.backbone.description()
        return {"per_sample": True, "backbone": backbone}

    def write_backbone(self, folder: Path) -> None:
        """Write the weights of the backbone into a bundle's folder, if there are any."""
        if self.backbone is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.backbone.tensors.items()}
            save_file(tensors, folder / FILE)
