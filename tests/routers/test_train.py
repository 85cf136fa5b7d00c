"""Training as the paper does: the student obeys, routers learn, and a stopped training continues exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import routers
from backbones.hunyuan3d.family import TRANSFORMER_2
from backbones.workloads import MeshWorkload
from routers.bundle import Bundle, pack
from routers.calibrate.evaluate import evaluate
from routers.calibrate.state import State
from routers.calls import first_tensor, flatten, unflatten
from routers.derive import derive
from routers.elastic import Elastic
from routers.meta import count_flops
from routers.policy import FixedPolicy
from routers.spec import WIDTHS
from routers.trace import FULL, REUSE, SKIP
from routers.train import progress
from routers.train.loop import LossNotFiniteError, Training, noise_at, rate_at
from routers.train.objective import decide
from routers.train.settings import TrainSettings
from routers.train.student import Decision, Memory, Student
from routers.train.trajectory import RecordedCall, as_json
from routers.trained.backbone import FILE, BackboneWeights, add_lora, lora_targets
from routers.trained.policy import Profile, TrainedPolicy, allocate
from routers.trained.router import BudgetRouter, build_router
from tests.block_kinds import CASES, Case
from tests.tiny_workloads import mesh_workload
from tests.zoo.catalogue import MODELS

SHORT = TrainSettings(steps=6, hidden=4, low=0.5, every=3, rank=2)


@pytest.fixture(scope="module")
def workload() -> MeshWorkload:
    return mesh_workload()


def train(workload: MeshWorkload, settings: TrainSettings = SHORT, **more) -> Bundle:
    training = Training(
        workload.pipe.transformer, TRANSFORMER_2, workload, settings, Accelerator(cpu=True), **more
    )
    return training.run("m", 5.0)


def started(folder: Path, resume: bool = False) -> State:
    state = State(folder)
    state.begin({}, resume)
    return state


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_student_does_what_the_elastic_model_will_do(case: Case, save_memory: bool) -> None:
    model, inputs = case.transformer(), case.inputs(2, 0.7, 0)
    student = Student(model, case.spec, save_memory)
    codes = np.random.default_rng(0).integers(SKIP + 1, len(WIDTHS), (2, len(student.blocks)))
    codes[codes == SKIP + 1] = SKIP
    elastic = Elastic(model, case.spec, lambda: FixedPolicy(codes[None]))
    with torch.no_grad(), elastic.scope(num_steps=1):
        expected = first_tensor(model(**inputs))
    elastic.detach()
    gate = torch.tensor(codes >= 0).float().requires_grad_()
    width = torch.nn.functional.one_hot(torch.tensor(codes).clamp_min(0), 4).float().requires_grad_()
    with student.attached(), student.deciding(Decision(gate, width)):
        found = first_tensor(model(**inputs))
        found.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-5)
    closed = torch.tensor(codes == SKIP)
    assert (gate.grad[closed] != 0).all(), "a closed gate learns whether it had better been open"
    assert (width.grad.flatten(0, 1)[~closed.flatten()] != 0).any()
    dense = first_tensor(case.transformer()(**inputs))
    assert torch.equal(first_tensor(model(**inputs)), dense), "detached is never attached"


@pytest.mark.parametrize("name", ["Latte", "ErnieImage"])
def test_streams_go_back_where_their_rows_lie(name: str) -> None:
    """Frames side by side, and rows in the second axis: decisions hold for the rows that they are for."""
    (model,) = [m for m in MODELS if m.name.startswith(name)]
    transformer, call = model.build(), model.call(2, 0.5)
    spec = derive(transformer, model.call()).spec
    student = Student(transformer, spec)
    codes = np.random.default_rng(0).choice([SKIP, 0, FULL], (2, len(student.blocks))).astype(np.int8)
    elastic = Elastic(transformer, spec, lambda: FixedPolicy(codes[None]))
    with torch.no_grad(), elastic.scope(num_steps=1):
        expected = first_tensor(transformer(**call))
    elastic.detach()
    gate = torch.tensor(codes >= 0).float()
    width = torch.nn.functional.one_hot(torch.tensor(codes).long().clamp_min(0), 4).float()
    with torch.no_grad(), student.attached(), student.deciding(Decision(gate, width)):
        found = first_tensor(transformer(**call))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_closed_block_falls_back_on_what_it_remembers_as_the_policy_will(case: Case) -> None:
    model, spec = case.transformer(), case.spec
    student, trend = Student(model, spec), torch.tensor(0.6)
    blocks, rng = len(student.blocks), np.random.default_rng(0)
    plan = rng.choice([REUSE, FULL], (4, 2, blocks)).astype(np.int8)
    plan[0] = FULL

    class Given(TrainedPolicy):
        reads_routers = property(lambda self: False, lambda self, value: None)

        def _actions(self, call, logits):
            return np.where(plan[call.step] == REUSE, SKIP, FULL).astype(np.int8)

    policy = Given(Profile(np.array([0.5, 1.0]), np.ones((2, 4))), np.full(blocks, 0.6))
    elastic, calls = Elastic(model, spec), [case.inputs(2, 0.9 - 0.2 * i, i) for i in range(4)]
    with torch.no_grad(), elastic.scope(num_steps=4, policy=policy, budget=0.5):
        expected = [first_tensor(model(**call)) for call in calls]
    elastic.detach()
    memory = Memory()
    for step, call in enumerate(calls):
        gate = torch.tensor(plan[step] >= 0).float()
        decision = Decision(gate, torch.tensor([0.0, 0, 0, 1]).expand(2, blocks, 4), trend.expand(blocks))
        recorded = RecordedCall(call, torch.zeros(0), None, torch.zeros(0))
        with torch.no_grad(), student.attached(), student.deciding(decision):
            assert torch.allclose(student(recorded, memory), expected[step], atol=1e-4), step
        memory.evaluation += 1


@pytest.mark.parametrize("time_dim", [0, 6])
def test_a_router_folded_at_a_budget_equals_the_router_told_it(time_dim: int) -> None:
    torch.manual_seed(0)
    router = BudgetRouter(8, time_dim, 5)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pooled, modulation = torch.randn(3, 8), torch.randn(3, 6) if time_dim else None
    told = router.at_budgets(pooled, modulation, torch.full((3,), 0.6))
    folded = router.at(0.6).heads(pooled, modulation)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(told, folded, strict=True))
    assert not torch.allclose(router.at(0.9).heads(pooled, modulation)[0], told[0], atol=1e-2)
    assert type(build_router(router.state_dict())) is BudgetRouter


def test_decisions_are_hard_and_drawn_in_proportion() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = torch.full((4000, 1), 1.0, requires_grad=True)
    width = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(4000, 1, 4).clone().requires_grad_()
    drawn = decide(gate, width, 1.0, generator)
    assert set(drawn.gate.unique().tolist()) <= {0.0, 1.0}
    assert drawn.gate.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.03)
    share = torch.softmax(torch.tensor([0.0, 1.0, 0.0, 0.0]), 0)
    assert torch.allclose(drawn.width.mean((0, 1)), share, atol=0.03)
    drawn.gate.sum().backward()
    assert (gate.grad > 0).all()
    fixed = decide(gate, width, 0.0, generator)
    assert (fixed.gate == 1).all() and (fixed.width[..., 1] == 1).all()


def test_allocation_follows_the_gates_and_meets_the_target() -> None:
    table = np.outer([4.0, 4.0, 4.0], [0.7, 0.8, 0.9, 1.0])
    logits = np.array([[0, 0, 0, 0, 9], [2, 0, 0, 0, 9], [1, 0, 0, 9, 0]], np.float32)
    assert allocate(logits, table, 4.0).tolist() == [SKIP, 3, SKIP]
    assert allocate(logits, table, 7.6).tolist() == [SKIP, 3, 2]
    assert allocate(logits, table, 12.0).tolist() == [3, 3, 3], "widths take up the rest"
    assert allocate(logits, table, 0.0).tolist() == [SKIP] * 3


def test_a_profile_is_interpolated_and_starts_dense() -> None:
    profile = Profile(np.array([0.5, 1.0]), np.array([[1.0, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]]))
    assert profile.at(0.75, 4) == pytest.approx([1.0, 0.7, 0.65, 0.6])
    assert profile.at(0.5, 7)[[0, 1, 6]] == pytest.approx([1.0, 0.4, 0.2])


def test_arguments_survive_the_recording() -> None:
    arguments = {"x": torch.ones(2), "by": {"main": torch.zeros(1)}, "shape": [[(1, 2, 3)]], "flag": None}
    tensors, constants = flatten(arguments)
    back = unflatten(tensors, {name: as_json(name, value) for name, value in constants.items()})
    assert back["by"]["main"] is tensors["by.main"] and back["x"] is tensors["x"]
    assert back["shape"] == [[[1, 2, 3]]] and back["flag"] is None
    with pytest.raises(ValueError, match="argument odd is a object, which cannot be recorded"):
        as_json("odd", object())


def test_training_learns_and_its_bundle_keeps_every_budget(workload: MeshWorkload, tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []
    settings = replace(SHORT, steps=40, rate=0.05, low=0.75)
    start = train(workload, replace(settings, steps=1, rate=1e-9))
    bundle = train(workload, settings, log=lambda step, terms: logged.append(terms))
    assert len(logged) == 40
    assert set(logged[0]) == {"distillation", "cost", "total", "gradient", "rate"}

    def deviation(made: Bundle) -> float:
        return float(np.abs(made.trained.profile.spend.mean(axis=1) - made.trained.profile.budgets).mean())

    assert deviation(bundle) < 0.8 * deviation(start), "routers spend what they are told"
    bundle.save(tmp_path / "b")
    again = routers.load_bundle(tmp_path / "b")
    assert again.metadata["method"] == "train" and again.metadata["training"]["steps"] == 40
    for row in evaluate(again, workload, [0.75, 0.85, 1.0]):
        assert max(row.budget - row.spent_low, row.spent_high - row.budget) < 0.01
    assert row.snr > 100


def test_spent_flops_are_the_counted_ones(workload: MeshWorkload) -> None:
    bundle, transformer = train(workload, replace(SHORT, steps=1)), workload.pipe.transformer
    elastic = routers.attach(transformer, bundle, budget=0.7, force=True)
    try:
        with torch.no_grad(), elastic.scope(num_steps=workload.num_steps, samples=workload.rows) as trace:
            workload.run(0)  # costs are known from here on
        with torch.no_grad(), elastic.scope(num_steps=workload.num_steps, samples=workload.rows) as trace:
            counted = count_flops(workload.run, 0)
    finally:
        elastic.detach()
    assert trace.flops["spent"] == pytest.approx(counted, rel=0.01)
    assert len({call.actions.tobytes() for call in trace.calls}) > 1
    rows = np.stack([call.actions for call in trace.calls])
    assert (rows == REUSE).any(), "a closed block adds what its last passes tell"


@pytest.mark.parametrize("what", ["routers", "lora", "full"])
def test_a_stopped_training_continues_exactly(workload: MeshWorkload, tmp_path: Path, what: str) -> None:
    settings = replace(SHORT, train=what)
    transformer = workload.pipe.transformer
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    whole = train(workload, settings, state=started(tmp_path / "one"))

    def stop(step: int, terms: dict[str, float]) -> None:
        if step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(workload, settings, state=started(tmp_path / "two"), log=stop)
    steps: list[int] = []
    continued = train(
        workload, settings, state=started(tmp_path / "two", True), log=lambda step, terms: steps.append(step)
    )
    assert steps == [4, 5, 6], "from the state kept after step 3"
    for a, b in zip(whole.trained.routers, continued.trained.routers, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert what == "routers" or all(
        torch.equal(t, continued.trained.backbone.tensors[n])
        for n, t in whole.trained.backbone.tensors.items()
    )
    after = dict(transformer.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)


@pytest.mark.parametrize("what", ["lora", "full"])
def test_trained_weights_are_loaded_with_the_bundle_and_leave_with_it(
    workload: MeshWorkload, tmp_path: Path, what: str
) -> None:
    bundle = train(workload, replace(SHORT, train=what, backbone_rate=0.02, save_memory=True))
    bundle.save(tmp_path / "b")
    assert (tmp_path / "b" / FILE).is_file()
    loaded = routers.load_bundle(tmp_path / "b")
    dense = workload.run(0)
    elastic = routers.attach(workload.pipe.transformer, loaded, budget=1.0)
    with torch.no_grad(), elastic.scope(num_steps=workload.num_steps, samples=workload.rows):
        changed = workload.run(0)
    elastic.detach()
    assert not torch.allclose(changed, dense, atol=1e-4)
    assert torch.equal(workload.run(0), dense)
    with pytest.raises(ValueError, match="holds trained weights of the backbone"):
        pack(tmp_path / "b", tmp_path / "one.safetensors")
    assert bundle.trained is not None and bundle.trained.backbone is not None
    others = {n: t + 1 for n, t in bundle.trained.backbone.tensors.items()}
    save_file(others, tmp_path / "b" / FILE)
    with pytest.raises(ValueError, match="is not the file that this bundle was written with"):
        routers.load_bundle(tmp_path / "b")
    (tmp_path / "b" / FILE).unlink()
    with pytest.raises(ValueError, match="safetensors is missing"):
        routers.load_bundle(tmp_path / "b")


def test_lora_reaches_every_linear_of_every_family_and_comes_off() -> None:
    for case in CASES:
        model, inputs = case.transformer(), case.inputs(2, 0.7, 0)
        dense, names = first_tensor(model(**inputs)), [name for name, _ in model.named_parameters()]
        targets = lora_targets(model, case.spec)
        undo = add_lora(model, targets, 2)
        adapters = {n: torch.randn_like(p) for n, p in model.named_parameters() if ".lora_" in n}
        undo()
        assert len(adapters) == 2 * len(targets) > 0
        take_off = BackboneWeights("lora", adapters, 2, targets).apply(model)
        assert not torch.allclose(first_tensor(model(**inputs)), dense, atol=1e-3)
        take_off()
        assert [name for name, _ in model.named_parameters()] == names
        assert torch.equal(first_tensor(model(**inputs)), dense)


def test_a_loss_that_is_none_stops_and_keeps_the_last_good_state(
    workload: MeshWorkload, tmp_path: Path, monkeypatch
) -> None:
    from routers.train import loop

    steps, honest, rate = [0], loop.relative_error, loop.rate_at
    monkeypatch.setattr(loop, "rate_at", lambda step, of: (steps.append(step), rate(step, of))[1])
    monkeypatch.setattr(
        loop, "relative_error", lambda *a: honest(*a) * (float("nan") if steps[-1] == 4 else 1.0)
    )
    message = (
        "the distillation loss is nan at step 5 of 6; the state after step 3 is kept: continue with --res"
    )
    with pytest.raises(LossNotFiniteError, match=message):
        train(workload, state=started(tmp_path / "s"))
    monkeypatch.undo()
    steps: list[int] = []
    bundle = train(workload, state=started(tmp_path / "s", True), log=lambda step, terms: steps.append(step))
    assert steps[0] == 4 and all(v.isfinite().all() for r in bundle.trained.routers for v in r.values())


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / progress.NAME).write_bytes(b"no state")
    with pytest.raises(ValueError, match="is damaged; leave out --resume to start anew"):
        progress.restore(tmp_path, {}, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))


def test_schedules() -> None:
    assert rate_at(0, 100) == pytest.approx(0.2) and rate_at(5, 100) == 1.0
    assert rate_at(99, 100) == pytest.approx(0.1, abs=0.01)
    settings = TrainSettings(steps=100, settle=0.3)
    assert (noise_at(0, settings), noise_at(70, settings)) == (1.0, 1.0)
    assert noise_at(85, settings) == pytest.approx(0.5) and noise_at(99, settings) < 0.05


def test_the_policy_is_dense_at_a_full_budget_and_forgets() -> None:
    policy = TrainedPolicy(Profile(np.array([0.5, 1.0]), np.ones((2, 3))))
    from routers.policy import RunInfo

    policy.start(RunInfo(3, 1.0))
    assert not policy.reads_routers
    policy.start(RunInfo(3, 0.5))
    assert policy.reads_routers
