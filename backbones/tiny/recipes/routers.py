"""Step `routers`: train the routers of a tiny model, with its transformer, along its own elastic runs.

    python -m backbones.tiny.recipes.routers --model runs/elastic/last.pt --device cuda --minutes 1.5
    python -m backbones.tiny.recipes.routers --family flux-turbo --model runs/flux/turbo/last.pt
        --text runs/flux/dit/last.pt --tokenizer runs/flux/tokenizers --out runs/flux/routers

As `edit calibrate --method train` (routers/train), for all budgets at once and from noise to picture: groups
of samples are under way, each with a number of evaluations of its own, and every training step is one
evaluation of all of them, at the states to which the trained network's own answers have led. What it says is
held against the model as it was, guided, at these very states. A closed block adds what its last passes say
that it would. Routers decide one evaluation ahead for all branches of a sample; at the first they see nothing
but learned numbers. Some samples are the whole model, and as many the least one (sandwich).

Writes to `--out`: last.pt (to resume), routers.safetensors, and with `--train full` a parcel (parcel.py) in
`parcel`: of qwen-image-tiny the model, for step `export`; of flux-tiny-turbo the transformer.
`routers_bundle` makes the packaged bundle of them.

Shapes: S samples, R rows, N blocks, E time embedding, C packed latent channels, W widths.
"""

import argparse
import json
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from backbones.tiny.recipes import dit
from backbones.tiny.recipes.dataset import SQUARE, TrainingSet, all_captions
from backbones.tiny.recipes.dit import TEXT_TOKENS, TinyModel, load_average
from backbones.tiny.recipes.flux.teacher import guided_velocity
from backbones.tiny.recipes.flux.text import Prompts
from backbones.tiny.recipes.muon import Muon
from backbones.tiny.recipes.parcel import compress, untied, write_parts
from backbones.tiny.recipes.routers_model import Passes, Qwen, Seen, Turbo, costs, forward
from backbones.tiny.recipes.text import PromptTokens
from backbones.tiny.recipes.training import ADAM_OPTIONS, Loop, Step, cosine
from routers.spec import WIDTHS
from routers.train.objective import Routers, all_open_at_full, decide
from routers.train.trajectory import Costs

HIDDEN = 32  # of a router
GROUPS = 8
EVALUATIONS = {20: 0.45, 10: 0.15, 6: 0.15, 4: 0.15, 3: 0.1}  # number of a run: share of the training steps
SHIFTS = (1.0, 2.0)  # of a run's times towards the noise
ROUTER_RATE = 3e-3
OTHER_RATE = 1e-4  # of the transformer's weights that are no matrices, and of its modulations
COST = 10.0  # weight of spending beside what the budget says, in the mean of budgets alike
OWN_COST = 1.0  # the same for each evaluation of a sample
BINS = 5  # budgets alike
SETTLE = 0.3  # share of the time, at the end, in which the noise on the decisions fades
FLOOR = 1e-4  # of relative errors
CHECK_BUDGETS = (1.0, 0.7, 0.5, 0.3)


class Routed(nn.Module):
    """What trains: routers, what they are told before anything was computed, and maybe the transformer."""

    def __init__(self, blocks: int, dim: int, transformer: nn.Module | None):
        super().__init__()
        self.routers = Routers(blocks, dim, dim, HIDDEN)
        self.start_pooled = nn.Parameter(torch.randn(blocks, dim))
        self.start_modulation = nn.Parameter(torch.randn(dim))
        if transformer is not None:
            self.dit = transformer

    def logits(self, seen: Seen | None, first: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Gate logits (S, N) and width logits (S, N, W). first (S,) bool: samples that have seen nothing."""
        pooled = self.start_pooled[:, None].expand(-1, len(budget), -1)
        modulation = self.start_modulation.expand(len(budget), -1)
        if seen is not None:
            pooled = torch.where(first[:, None], pooled, seen.pooled)
            modulation = torch.where(first[:, None], modulation, seen.modulation)
        return self.routers(pooled, modulation, budget)


@dataclass
class Group:
    """Samples whose runs have the same times. x (S, N, C); sigmas: of evaluations, and 0; at: the next."""

    x: Tensor
    text: tuple[Tensor, ...]
    budget: Tensor
    sigmas: list[float]
    at: int = 0


class Runs:
    """The runs under way. low: the least budget. evaluations: numbers and their shares of the steps."""

    def __init__(
        self, model: Qwen | Turbo, data: TrainingSet, samples: int, low: float, generator: torch.Generator
    ):
        self.model, self.data, self.low, self.generator = model, data, low, generator
        self.size = max(1, samples // GROUPS)
        self.evaluations = EVALUATIONS if isinstance(model, Qwen) else {4: 1.0}
        self.groups = [self.begin() for _ in range(GROUPS)]
        self.fresh = [True] * GROUPS

    def draw(self) -> tuple[list[float], Tensor]:
        """Times of a run, and budgets (S,) of its samples: some whole, some the least."""
        numbers = list(self.evaluations)
        odds = torch.tensor([self.evaluations[number] / number for number in numbers])
        number = numbers[int(torch.multinomial(odds, 1, generator=self.generator))]
        shift = SHIFTS[0] + (SHIFTS[1] - SHIFTS[0]) * float(torch.rand((), generator=self.generator))
        shift = shift if isinstance(self.model, Qwen) else 1.0
        sigmas = [1 - step / number for step in range(number + 1)]
        sigmas = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
        low = min(0.3, max(self.low, 1.6 / number))  # with few evaluations less is nothing
        budget = low + (1 - low) * torch.rand(self.size, generator=self.generator)
        budget[::8], budget[1::8] = 1.0, low
        return sigmas, budget

    def begin(self, sigmas: list[float] | None = None, budget: Tensor | None = None) -> Group:
        """New prompts and noise."""
        drawn = self.draw() if sigmas is None or budget is None else (sigmas, budget)
        batch = self.data.batch(self.size, SQUARE)
        x = torch.randn_like(batch.latents)
        with torch.autocast(x.device.type, torch.bfloat16):
            text = self.model.text(batch.captions, x.device)
        return Group(x, text, drawn[1].to(x.device), drawn[0])

    def refill(self) -> None:
        """Begin anew where runs have ended."""
        for number, group in enumerate(self.groups):
            if group.at == len(group.sigmas) - 1:
                self.groups[number], self.fresh[number] = self.begin(), True

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all samples (S,): sigma now and then, number of the evaluation, and whether it is the first."""
        rows = [[g.sigmas[g.at], g.sigmas[g.at + 1], float(g.at)] for g in self.groups]
        now, then, at = (
            torch.tensor(rows).to(self.groups[0].x.device).repeat_interleave(self.size, 0).unbind(1)
        )
        return now, then, at, at == 0

    def text(self) -> tuple[Tensor, ...]:
        """Of all rows, one branch after the other."""
        parts = zip(*(group.text for group in self.groups), strict=True)
        branches = self.model.branches
        return tuple(
            torch.cat(
                [piece for branch in range(branches) for piece in (t.chunk(branches)[branch] for t in part)]
            )
            for part in parts
        )

    def advance(self, x: Tensor) -> None:
        """All samples to their next evaluation, at x (S, N, C)."""
        for number, (group, part) in enumerate(zip(self.groups, x.split(self.size), strict=True)):
            group.x, group.at, self.fresh[number] = part, group.at + 1, False


def guided(velocity: Tensor, model: Qwen | Turbo) -> Tensor:
    """Velocities (R, N, C) of all branches as the pipeline combines them, (S, N, C)."""
    if model.branches == 1:
        return velocity
    return guided_velocity(*velocity.chunk(2), model.guidance)


def relative(answer: Tensor, target: Tensor) -> Tensor:
    """Squared error (R,) over the target's energy."""
    error = (answer - target).square().mean((1, 2))
    return error / target.square().mean((1, 2)).clamp_min(1e-6)


def spending(gate: Tensor, width: Tensor, prices: Costs, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Expected spend (S,), and the loss of spending beside the budgets (S,): see COST and OWN_COST."""
    widths = torch.tensor(WIDTHS, device=gate.device)
    spend = prices.at(torch.sigmoid(gate), torch.softmax(width, -1) @ widths).float()
    off = (spend - budget) * (budget < 1)
    places = torch.linspace(0, 1, BINS, device=gate.device)
    near = (1 - (budget[:, None] - places).abs() * (BINS - 1)).clamp_min(0)
    means = (near * off[:, None]).sum(0) / near.sum(0).clamp_min(1e-6)
    return spend, COST * means.square().mean() + OWN_COST * off.square().mean()


def landed(gate: Tensor, width: Tensor, prices: Costs, budget: Tensor) -> Tensor:
    """Gate logits (S, N) shifted so that as many blocks are open, each at its most probable width, as cost
    nearest to the budgets (S,): about what `routers.trained.policy.allocate` does.
    """
    widths = torch.tensor(WIDTHS, device=gate.device)[width.argmax(-1)]
    order = gate.sort(1, descending=True).values
    spent = torch.stack([prices.at((gate >= least[:, None]).float(), widths) for least in order.T], 1)
    best = (spent - budget[:, None]).abs().argmin(1, keepdim=True)
    return gate - order.gather(1, best) + 1e-5


class Trainer:
    """One evaluation of all runs after the other."""

    def __init__(self, routed: Routed, model: Qwen | Turbo, teacher: Qwen | Turbo, runs: Runs):
        self.routed, self.model, self.teacher, self.runs = routed, model, teacher, runs
        self.passes, self.seen = Passes(len(model.blocks)), None
        group = runs.groups[0]
        alone = tuple(part[:: runs.size][: model.branches] for part in group.text)
        self.prices = costs(teacher, group.x[:1], alone)

    def step(self, progress: float) -> Step:
        """The loss of one evaluation; the runs go on along its answers."""
        runs, model = self.runs, self.model
        runs.refill()
        if any(runs.fresh):
            fresh = torch.tensor(runs.fresh).repeat_interleave(runs.size).to(runs.groups[0].x.device)
            self.passes.forget(fresh.repeat(model.branches))
        x, text = torch.cat([group.x for group in runs.groups]), runs.text()
        budget = torch.cat([group.budget for group in runs.groups])
        now, then, at, first = runs.columns()
        gate, width = self.routed.logits(self.seen, first, budget)
        noise = min(1.0, (1 - progress) / SETTLE)
        decision = decide(gate, width, noise, runs.generator)
        decision = all_open_at_full(replace(decision, trend=self.routed.routers.trend), budget)
        answer, self.seen = forward(model, x, now, text, decision, self.passes, at)
        with torch.no_grad():
            target, _ = forward(self.teacher, x, now, text)
        way = guided(answer, model)
        errors = relative(way, guided(target, model))
        both = (errors + relative(answer, target).view(model.branches, -1).mean(0)) / 2
        distance = (both + FLOOR).sqrt().mean()
        spend, cost = spending(gate, width, self.prices, budget)
        runs.advance(x + (then - now)[:, None, None] * way.detach())
        shown = {"error": errors, "spend": spend, "budget": budget}
        return Step(distance + cost, len(x), {k: v.mean().item() for k, v in shown.items()})

    @torch.no_grad()
    def check(self, samples: int, evaluations: int) -> None:
        """Print how far runs at some budgets end from the whole model's as it was, and what they spend."""
        runs, model, end = self.runs, self.model, []
        group = runs.begin([1 - s / evaluations for s in range(evaluations + 1)], torch.ones(runs.size))
        samples = min(samples, runs.size)
        text = tuple(torch.cat([part[:samples] for part in t.chunk(model.branches)]) for t in group.text)
        for budget in (None, *CHECK_BUDGETS):
            x, passes, seen, spent = group.x[:samples], Passes(len(model.blocks)), None, []
            told = torch.full((samples,), budget or 1.0, device=x.device)
            for at in range(evaluations):
                now = torch.full((samples,), group.sigmas[at], device=x.device)
                decision = None
                if budget is not None:
                    gate, width = self.routed.logits(seen, torch.full_like(told, at == 0).bool(), told)
                    gate = landed(gate, width, self.prices, told)
                    decision = decide(gate, width, 0.0, runs.generator)
                    decision = all_open_at_full(replace(decision, trend=self.routed.routers.trend), told)
                    spent.append(self.prices.at(decision.gate, decision.ratio()).mean())
                number = torch.full_like(now, float(at))
                whom = self.teacher if budget is None else model
                answer, seen = forward(whom, x, now, text, decision, passes, number)
                x = x + (group.sigmas[at + 1] - group.sigmas[at]) * guided(answer, model)
            end.append((budget, x, spent))
        goal = end[0][1]
        for budget, x, spent in end[1:]:
            error = relative(x, goal).mean().item()
            print(f"routers: {evaluations} evaluations at budget {budget}: spent "
                  f"{torch.stack(spent).mean().item():.3f}, error {error:.4f}", flush=True)  # fmt: skip


def optimizers(routed: Routed, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for routers at ROUTER_RATE, and for the transformer's small weights; Muon for its matrices."""
    routers, matrices, others = [], [], []
    for name, p in routed.named_parameters():
        matrix = p.dim() == 2 and "transformer_blocks" in name and "_mod" not in name and "norm" not in name
        (routers if not name.startswith("dit.") else matrices if matrix else others).append(p)
    own = [
        {"params": part, "lr": rate} for part, rate in ((routers, ROUTER_RATE), (others, OTHER_RATE)) if part
    ]
    adam = torch.optim.AdamW(own, **ADAM_OPTIONS)
    return [adam, Muon(matrices, lr=lr)] if matrices else [adam]


def load(args: argparse.Namespace) -> tuple[Qwen | Turbo, TrainingSet]:
    """The frozen model as it was, on the device, and the data."""
    index = json.loads((args.data / "pictures.json").read_text())
    if args.family == "flux-turbo":
        from backbones.tiny.recipes.flux.turbo import load_teacher, load_turbo

        prompts = Prompts.load(args.tokenizer)
        prompts.read(all_captions(args.latents))
        text = load_teacher(args.text, prompts).to(args.device)
        data = TrainingSet(args.latents, index, args.seed, prompts.fits, args.device)
        return Turbo(load_turbo(args.model, text.dit).to(args.device), text.encode, prompts), data
    tokens = PromptTokens(Qwen2Tokenizer.from_pretrained(args.tokenizer))
    tokens.read(all_captions(args.latents))
    model = load_qwen(args.model, tokens).to(args.device)
    tokens.prefix = tokens.prefix.to(args.device)
    fits = lambda text: len(tokens.ids(text)) <= TEXT_TOKENS  # noqa: E731
    return Qwen.of(model, tokens), TrainingSet(args.latents, index, args.seed, fits, args.device)


def load_qwen(place: Path, tokens: PromptTokens) -> TinyModel:
    """The EMA weights of a checkpoint or a parcel, or those of a pipeline folder, frozen in fp32."""
    if not (place / "transformer").is_dir():
        return load_average(place, tokens.tokenizer)
    model = TinyModel(tokens.tokenizer)
    model.dit = type(model.dit).from_pretrained(place / "transformer").float()
    model.text = Qwen2_5_VLForConditionalGeneration.from_pretrained(place / "text_encoder").float()
    return model.requires_grad_(False).eval()


def train(args: argparse.Namespace) -> None:
    """Run or resume until `args.minutes` are used up, then write what was learnt."""
    torch.manual_seed(args.seed)
    teacher, data = load(args)
    full = args.train == "full"
    model = replace(teacher, dit=deepcopy(teacher.dit).requires_grad_(full)) if full else teacher
    dim = model.blocks[0].attn.to_q.in_features
    routed = Routed(len(model.blocks), dim, model.dit if full else None).to(args.device)
    made = optimizers(routed, args.lr)
    loop = Loop(
        "routers", routed, made, args.out / "last.pt", args.minutes, ROUTER_RATE, args.ema,
        partial(cosine, warm_up=30, floor=0.05), args.seed, args.max_steps, 20, ema_start=1,
        adam_factor=args.lr / ROUTER_RATE,
    )  # fmt: skip
    data.reseed(args.seed + loop.step)
    trainer = Trainer(routed, model, teacher, Runs(model, data, args.batch, args.low, loop.generator))
    print(f"routers: {sum(p.numel() for p in routed.parameters()) / 1e6:.2f} M train", flush=True)
    loop.run(trainer.step)
    loop.load_average()
    for evaluations in (20, 4) if isinstance(model, Qwen) else (4,):
        trainer.check(args.check_samples, evaluations)
    weights = {name: p.detach().cpu() for name, p in routed.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    own = {name: p.contiguous() for name, p in weights.items() if not name.startswith("dit.")}
    save_file(own, args.out / "routers.safetensors", {"family": args.family, "low": str(args.low)})
    if full:
        trained = {name: p for name, p in weights.items() if name.startswith("dit.")}
        if isinstance(model, Qwen):  # whole, as step `export` reads it
            trained |= {f"text.{name}": p.cpu() for name, p in model.encoder.state_dict().items()}
        write_parts(compress(untied(trained), 16), args.out / "parcel")
    print(f"routers: -> {args.out}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = dit.arguments(__doc__, Path("runs/routers"), 60.0, 3e-4, 0.98)
    parser.set_defaults(batch=512, compile=False)
    parser.add_argument("--family", choices=("qwen", "flux-turbo"), default="qwen")
    parser.add_argument("--model", type=Path, default=Path("runs/elastic/last.pt"), help="a checkpoint, or a "
                        "pipeline folder")  # fmt: skip
    parser.add_argument("--text", type=Path, default=Path("runs/flux/dit/last.pt"), help="of flux-turbo: the "
                        "checkpoint, or pipeline folder, of its text encoders")  # fmt: skip
    parser.add_argument("--train", choices=("full", "routers"), default="full", help="with the transformer "
                        "or without it")  # fmt: skip
    parser.add_argument("--low", type=float, default=0.08, help="the least budget of an evaluation")
    parser.add_argument("--check-samples", type=int, default=64)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
