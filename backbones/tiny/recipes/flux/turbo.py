"""Step `turbo`: flux-tiny in four steps without guidance, by distillation along the student's own runs.

    python -m backbones.tiny.recipes.flux.turbo --teacher runs/flux/dit/last.pt --device cuda --minutes 1.5

The student begins as the teacher told one guidance scale, its embedding folded into a bias: the class then
is that of a schnell model. It runs the four steps of such a model (sigma 1, 0.75, 0.5, 0.25). At every state
to which its own answers lead, the teacher goes on to the next sigma in finer steps, and the student learns to
get there in one (progressive distillation, Salimans & Ho 2022, arXiv 2202.00512, on the student's own states,
so that errors of one step are mended in the next). Rows run in four groups, each at another step, so that
every batch holds all of them. In part of the rows blocks are skipped and image MLPs narrowed at random, so
that the student is elastic. Both text encoders stay as they are.

Writes runs/flux/turbo/last.pt (to resume) and its averaged transformer as a parcel (parcel.py) in
runs/flux/turbo/parcel; `turbo_export` makes a pipeline folder of it.

Shapes: B batch, N image tokens, L text tokens, C packed latent channels, F MLP hidden units.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from backbones.tiny.recipes.dataset import SQUARE
from backbones.tiny.recipes.elastic import draw_subnetworks
from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.dit import PromptBatches, TinyFlux, load_data, load_model, muon_takes
from backbones.tiny.recipes.flux.fast_dit import Rope, dit_forward, rope
from backbones.tiny.recipes.flux.options import RUNS, arguments
from backbones.tiny.recipes.flux.text import T5_TOKENS, Prompts
from backbones.tiny.recipes.parcel import compress, fill, write_parts
from backbones.tiny.recipes.training import Loop, Step, cosine

STEPS = 4
SIGMAS = tuple(1 - step / STEPS for step in range(STEPS + 1))  # as FluxPipeline for a schnell model, shift 1
GUIDANCE = 3.5  # the scale that the student takes over
SUB_SHARE = 0.35  # rows of a batch in a sub-network, once the student is elastic
QUARTERS = 4  # of an MLP's hidden units: widths are multiples of a quarter

Velocity = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""(latents (B, N, C), sigma (B,), text) -> (B, N, C)."""


def load_teacher(place: Path, prompts: Prompts) -> TinyFlux:
    """The EMA weights of a checkpoint or a parcel, or those of a pipeline folder, frozen in fp32."""
    if not (place / "transformer").is_dir():
        return load_model(place, prompts)
    model = TinyFlux(prompts)
    model.clip = CLIPTextModel.from_pretrained(place / "text_encoder").float()
    model.t5 = T5EncoderModel.from_pretrained(place / "text_encoder_2").float()
    model.dit = FluxTransformer2DModel.from_pretrained(place / "transformer").float()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def without_guidance(dit: FluxTransformer2DModel, scale: float) -> FluxTransformer2DModel:
    """A copy of a transformer that takes no guidance scale and does what this one does at `scale`."""
    embed = dit.time_text_embed
    told = torch.tensor([float(scale)], device=embed.text_embedder.linear_2.bias.device)
    added = embed.guidance_embedder(embed.time_proj(told * 1000))[0]
    copy = FluxTransformer2DModel.from_config({**dit.config, "guidance_embeds": False}).to(told.device)
    state = {name: value for name, value in dit.state_dict().items() if "guidance_embedder" not in name}
    state["time_text_embed.text_embedder.linear_2.bias"] = embed.text_embedder.linear_2.bias + added
    copy.load_state_dict(state)
    return copy


def load_turbo(place: Path, teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The transformer of this step's checkpoint or parcel, or of a pipeline folder, frozen in fp32."""
    if (place / "transformer").is_dir():
        dit = FluxTransformer2DModel.from_pretrained(place / "transformer").float()
    else:
        dit = FluxTransformer2DModel.from_config({**teacher.config, "guidance_embeds": False})
        fill(dit, place)
    return dit.requires_grad_(False).eval()


def substeps(velocity: Velocity, x: Tensor, text: tuple[Tensor, Tensor], begin: Tensor, end: Tensor,
             count: int) -> Tensor:  # fmt: skip
    """Where the flow leads from x (B, N, C) at sigma `begin` (B,) to `end`, by `count` midpoint steps."""
    step = (end - begin) / count
    for number in range(count):
        now, size = begin + number * step, step[:, None, None]
        half = x + size / 2 * velocity(x, now, text)
        x = x + size * velocity(half, now + step / 2, text)
    return x


def random_choices(rows: int, blocks: int, hidden: int, share: float, generator: torch.Generator,
                   device: str) -> dict[str, Tensor]:  # fmt: skip
    """`keep` and `width_masks` of `dit_forward`, a share of the rows in random sub-networks."""
    keep, quarters = draw_subnetworks(rows, blocks, QUARTERS, generator, device)
    whole = (torch.rand(rows, generator=generator) >= share).to(device)[:, None, None]
    keep, quarters = (whole | part for part in (keep, quarters))
    return {"keep": keep, "width_masks": quarters.repeat_interleave(hidden // QUARTERS, dim=-1)}


@dataclass
class Group:
    """Rows that are at one step of their run. x (B, N, C); text: pooled CLIP state and T5 states."""

    x: Tensor
    text: tuple[Tensor, Tensor]
    step: int = 0


class Runs:
    """The student's runs under way, a group at each step."""

    def __init__(self, model: TinyFlux, batches: PromptBatches, rows: int):
        self.model, self.batches, self.rows = model, batches, max(1, rows // STEPS)
        self.groups = [self.begin(step) for step in range(STEPS)]

    @torch.no_grad()
    def begin(self, step: int = 0) -> Group:
        """New prompts and noise, or at a later step noised data in the place of the student's own states."""
        batch = self.batches(self.rows, SQUARE)
        with torch.autocast(batch.latents.device.type, torch.bfloat16):
            text = self.model.encode(batch.clip_ids, batch.t5_ids)
        x = torch.lerp(batch.latents, torch.randn_like(batch.latents), SIGMAS[step])
        return Group(x, tuple(part.float() for part in text), step)

    def rows_now(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """All groups as one batch: x, text, sigma (B,) now and after the next step."""
        self.groups = [self.begin() if group.step == STEPS else group for group in self.groups]
        x = torch.cat([group.x for group in self.groups])
        text = tuple(torch.cat(parts) for parts in zip(*(group.text for group in self.groups), strict=True))
        sigmas = torch.tensor([[SIGMAS[g.step], SIGMAS[g.step + 1]] for g in self.groups]).to(x.device)
        now, then = sigmas.repeat_interleave(self.rows, 0).unbind(1)
        return x, text, now, then

    def advance(self, x: Tensor) -> None:
        """Every group to its next step, at x (B, N, C)."""
        for group, part in zip(self.groups, x.split(self.rows), strict=True):
            group.x, group.step = part, group.step + 1


def velocity_of(dit: FluxTransformer2DModel, angles: Rope, guidance: float | None = None,
                **choices: Tensor) -> Velocity:  # fmt: skip
    """The transformer's velocity, fp32, computed in bf16. choices: of `dit_forward`."""

    def velocity(x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        scales = None if guidance is None else torch.full_like(sigma, guidance)
        with torch.autocast(x.device.type, torch.bfloat16):
            return dit_forward(dit, x, sigma, text, angles, scales, **choices).float()

    return velocity


def turbo_step(
    student: FluxTransformer2DModel, teach: Velocity, runs: Runs, angles: Rope, fine: int, share: float,
    generator: torch.Generator,
) -> Step:  # fmt: skip
    """Mean squared error of the step's mean velocity; the runs go on along the student's answers.

    fine: the teacher's midpoint steps within one of the student's. share: of rows in sub-networks.
    """
    x, text, now, then = runs.rows_now()
    blocks = len(student.transformer_blocks) + len(student.single_transformer_blocks)
    hidden = student.single_transformer_blocks[0].mlp_hidden_dim
    choices = random_choices(len(x), blocks, hidden, share, generator, x.device) if share else {}
    with torch.no_grad():
        goal = (substeps(teach, x, text, now, then, fine) - x) / (then - now)[:, None, None]
    answer = velocity_of(student, angles, **choices)(x, now, text)
    runs.advance(x + (then - now)[:, None, None] * answer.detach())
    return Step((answer - goal).square().mean(), len(x))


@torch.no_grad()
def check(
    student: FluxTransformer2DModel, teach: Velocity, runs: Runs, angles: Rope, rows: int, title: str
) -> None:
    """Print how far whole runs of the student end from the teacher's, whole and with all MLPs halved."""
    groups = [runs.begin() for _ in range(-(-rows // runs.rows))]
    x = torch.cat([group.x for group in groups])[:rows]
    text = tuple(torch.cat(part)[:rows] for part in zip(*(g.text for g in groups), strict=True))
    blocks = len(student.transformer_blocks) + len(student.single_transformer_blocks)
    hidden = student.single_transformer_blocks[0].mlp_hidden_dim
    half = {
        "keep": torch.ones(blocks, 1, 1, 1, device=x.device),
        "width_masks": (torch.arange(hidden, device=x.device) < hidden / 2).float().expand(blocks, 1, 1, -1),
    }

    def run(velocity: Velocity) -> Tensor:
        state = x
        for begin, end in itertools.pairwise(SIGMAS):
            state = state + (end - begin) * velocity(state, torch.full_like(x[:, 0, 0], begin), text)
        return state

    goal = substeps(teach, x, text, torch.ones_like(x[:, 0, 0]), torch.zeros_like(x[:, 0, 0]), 2 * STEPS)
    found = {"whole": run(velocity_of(student, angles)), "half": run(velocity_of(student, angles, **half)),
             "teacher in four steps": run(teach)}  # fmt: skip
    errors = {name: (end - goal).square().mean().item() / goal.var().item() for name, end in found.items()}
    print(
        f"turbo: {title}: of the variance " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()), flush=True
    )


def train(args) -> None:
    """Run or resume until `args.minutes` are used up, then write the parcel."""
    torch.manual_seed(args.seed)
    batches = load_data(args)
    teacher = load_teacher(args.teacher, batches.tokens).to(args.device)
    student = without_guidance(teacher.dit, args.guidance).requires_grad_(True)
    loop = Loop.from_args(
        "turbo", student, muon_takes, args, schedule=partial(cosine, warm_up=20), ema_start=1, log_every=20
    )
    batches.data.reseed(args.seed + loop.step)
    angles = rope(student, T5_TOKENS, (GRID, GRID), device=args.device)
    teach = velocity_of(teacher.dit, angles, args.guidance)
    runs = Runs(teacher, batches, args.batch)
    if not loop.step:
        check(student, teach, runs, angles, args.check_rows, "before")

    def take(progress: float) -> Step:
        share = SUB_SHARE if progress >= args.elastic_from else 0.0
        return turbo_step(student, teach, runs, angles, args.fine, share, loop.generator)

    loop.run(take)
    loop.load_average()
    check(student, teach, runs, angles, args.check_rows, "after")
    paths = write_parts(compress(student.state_dict(), 16), args.out / "parcel")
    print(f"turbo: {len(paths)} files -> {args.out / 'parcel'}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=60.0, ema=0.98)
    parser.set_defaults(out=RUNS / "turbo", lr=1e-3, compile=False)
    parser.add_argument(
        "--teacher",
        type=Path,
        default=RUNS / "dit" / "last.pt",
        help="checkpoint of step dit, or a pipeline folder",
    )
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="the teacher's scale")
    parser.add_argument("--fine", type=int, default=2, help="midpoint steps of the teacher in one step")
    parser.add_argument(
        "--elastic-from", type=float, default=0.25, help="share of the time from which on sub-networks train"
    )
    parser.add_argument("--check-rows", type=int, default=256, help="runs compared before and after")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
