"""Step `routers_bundle`: the bundle of what step `routers` has trained, for a model folder.

    python -m backbones.tiny.recipes.routers_bundle runs/routers -m qwen-image-tiny -o trained
    edit calibrate -m qwen-image-tiny --routers trained -o bundle          # and plans beside them

The folder's transformer must be the one that the routers were trained with: exported from the step's parcel,
or after `--train routers` from the checkpoint that it began with. How much routers spend at each step of a
run is measured on the model's calibration prompts.

Shapes: K budgets, N blocks, S steps, R rows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones import loading, registry
from backbones.spec import Placement
from backbones.tiny.recipes.routers import Routed
from backbones.workloads import PipelineWorkload
from routers.attachment import architecture, fingerprint
from routers.bundle import Bundle
from routers.elastic import Elastic
from routers.spec import WIDTHS
from routers.train.loop import PROFILE_BUDGETS
from routers.train.objective import expected_spend
from routers.train.trajectory import Trajectories, record_batch
from routers.trained.bundle import Trained
from routers.trained.policy import Profile

LOW = 0.2  # the least budget of an evaluation that is profiled


def read_routers(file: Path) -> Routed:
    """What step `routers` wrote, frozen. Raises ValueError for the file of something else."""
    weights = load_file(file)
    try:
        blocks, dim = weights["start_pooled"].shape
        routed = Routed(blocks, dim, None)
        routed.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is not of step routers: {error}") from None
    return routed.requires_grad_(False).eval()


def first_logits(routed: Routed, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Gate logits (K, N) and width logits (K, N, W) of the first call of a run at budgets (K,)."""
    return routed.logits(None, torch.ones_like(budgets, dtype=torch.bool), budgets)


def profile(routed: Routed, recorded: Trajectories) -> Profile:
    """What the routers spend at each step, from recorded dense runs, and how a run begins."""
    budgets = torch.linspace(LOW, 1.0, PROFILE_BUDGETS)
    gate, width = first_logits(routed, budgets)
    costs = recorded.costs(0, recorded.calls(0)[0], gate.device)
    begun = costs.at(torch.sigmoid(gate), torch.softmax(width, -1) @ torch.tensor(WIDTHS))
    spend = []
    for budget, first in zip(budgets, begun, strict=True):
        rows = torch.full((recorded.rows,), float(budget))
        steps = expected_spend(routed.routers, recorded, 0, rows).mean(1).double()
        spend.append(torch.cat([first[None].double(), steps[1:]]))
    logits = torch.cat([gate[..., None], width], dim=-1).double().numpy()
    return Profile(budgets.double().numpy(), np.stack([each.numpy() for each in spend]), logits)


@torch.no_grad()
def make_bundle(routed: Routed, workload: PipelineWorkload, low: float) -> Bundle:
    """A bundle for the workload's pipeline, whose first batch is run densely. low: the least budget."""
    transformer, spec = workload.pipe.transformer, workload.backbone.family.transformer
    elastic = Elastic(transformer, spec)
    try:
        recorded = Trajectories(workload, spec, len(elastic.blocks))
        recorded.hold(0, record_batch(elastic, workload, 0))
    finally:
        elastic.detach()
    states = [{k: v.contiguous() for k, v in r.state_dict().items()} for r in routed.routers.blocks]
    trend = routed.routers.trend.double().numpy()
    return Bundle(
        spec=spec,
        base_model=workload.backbone.name,
        architecture=architecture(transformer),
        fingerprint=fingerprint(transformer),
        num_steps=workload.num_steps,
        guidance=workload.guidance,
        times=recorded.tensor(0, "times").tolist(),
        min_budget=low,
        recommended_budget=max(low, 0.6),
        trained=Trained(states, profile(routed, recorded), trend),
        metadata={"method": "train", "training": {"step": "backbones.tiny.recipes.routers"}},
    )


def main() -> None:
    """Parse the command line and write the bundle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("routers", type=Path, help="folder that step routers wrote")
    parser.add_argument("-m", "--model", default="qwen-image-tiny", help="name or folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--low", type=float, default=0.3, help="the least budget that the bundle serves")
    args = parser.parse_args()
    backbone = registry.resolve(args.model)
    pipe = loading.load(backbone, Placement(device="cpu", dtype="auto"))
    pipe.set_progress_bar_config(disable=True)
    prompts = (backbone.folder / "calibration.txt").read_text("utf-8").splitlines()[: args.rows]
    usual = backbone.defaults
    workload = PipelineWorkload(
        pipe, backbone, args.rows, usual.steps, usual.guidance, prompts, usual.width, usual.height
    )
    bundle = make_bundle(read_routers(args.routers / "routers.safetensors"), workload, args.low)
    bundle.save(args.output)
    print(f"routers_bundle: {len(bundle.trained.routers)} routers -> {args.output}")


if __name__ == "__main__":
    main()
