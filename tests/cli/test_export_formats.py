"""The formats `reference` and `diffusers`, and the options of files: written, loaded again, run elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from backbones import registry
from edit_cli.errors import RunError
from edit_cli.export import reference as export_reference
from edit_cli.export.write import export
from edit_cli.generation.closeness import psnr
from edit_cli.request import Request
from routers.bundle import load_bundle
from routers.paper.checkpoint import is_release_file, read_release
from routers.static.choose import narrow_error
from routers.static.units import order_units
from routers.trained.backbone import BackboneWeights, add_lora, lora_targets
from tests.block_kinds import CASES
from tests.golden.runner import run_case

DATA = Path(__file__).parents[1] / "golden" / "data"
RELEASES = sorted(DATA.glob("edit_reference_*"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples; what is measured on them is not the subject here."""
    monkeypatch.setattr("edit_cli.export.source.SAMPLES", 1)
    monkeypatch.setattr("edit_cli.export.source.STEPS", 2)


def export_to(out, source, format: str, *, say=lambda text: None, **fields) -> dict:
    """`edit export` in this process, its options already checked."""
    return export(Request(source=str(source), output=str(out), format=format, **fields), say)


# -- reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RELEASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shard_size", [None, "1MB"])
def test_a_release_comes_back_and_runs_exactly(case: Path, shard_size, tmp_path: Path) -> None:
    """The exported checkpoint reproduces the recorded trajectory, decisions included."""
    out = tmp_path / "out"
    found = export_to(out, case / "weights.safetensors", "reference", shard_size=shard_size)
    assert found["difference"] == 0
    assert (len(found["weights"]) > 1) == (shard_size is not None)
    assert is_release_file(out)
    tensors = {k: v for name in found["weights"] for k, v in load_file(out / name).items()}
    again = tmp_path / case.name
    shutil.copytree(case, again)
    save_file(tensors, again / "weights.safetensors")
    report = run_case(again)
    assert report.ok, report.line()


def test_every_key_of_the_published_file_is_written(tmp_path: Path) -> None:
    """The table's 2413 names and numbers of dimensions, at size one."""
    table = json.loads((DATA / "keys" / "elastic_dit_checkpoint_keys.json").read_text())
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros([1] * len(shape)) for name, shape in table.items()}, file)
    out = tmp_path / "out"
    found = export_to(out, file, "reference", dtype="bf16", shard_size="2KB")
    written = read_release(out)
    assert set(written.shapes) == set(table)
    assert len(written.shards) == len(found["weights"]) > 1
    assert found["tensors"] == {"transformer": 2413 - 480, "routers": 480}
    assert found["dtypes"] == ["bfloat16"]


def test_a_changed_file_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    write = export_reference._write

    def spoiled(tensors, folder, shard_size):
        first = next(iter(tensors))
        return write({**tensors, first: tensors[first] + 1}, folder, shard_size)

    monkeypatch.setattr(export_reference, "_write", spoiled)
    with pytest.raises(RunError, match="differs by 1 when loaded") as caught:
        export_to(tmp_path / "x", RELEASES[0] / "weights.safetensors", "reference")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# -- diffusers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("qwen_folder", marks=pytest.mark.slow), "flux_folder"])
def test_stock_diffusers_loads_it_and_routers_do_the_same(name, request, tmp_path: Path, edit_here) -> None:
    source = request.getfixturevalue(name)
    out = tmp_path / "out"
    ran = edit_here(
        "export", source, "--format", "diffusers", "--shard-size", "50KB", "-o", out, "--json", cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert ran.json["difference"] <= 1e-5
    assert isinstance(ran.json["units"]["reordered"], bool)
    assert len(list((out / "transformer").glob("*.safetensors"))) > 1
    bundle = load_bundle(out / "routers")
    assert bundle.base_model == "out"
    assert registry.resolve(str(out)).bundle is not None
    texts = [file.read_text() for file in out.rglob("*.json")]
    assert not any(str(source) in text for text in texts), "no paths of this machine"

    pictures = []
    for model, file in ((source, "a.png"), (out, "b.png")):
        drawn = edit_here(
            "generate", "a cat", "-m", model, "--budget", "0.7", "-o", file, "--json", cwd=tmp_path
        )
        assert drawn.code == 0, drawn.err
        assert drawn.json["spent"] == [0.5]  # of 4 or of 2 steps
        pictures.append((drawn.json["spent"], Image.open(tmp_path / file).convert("RGB")))
    assert pictures[0][0] == pictures[1][0]
    assert psnr(pictures[0][1], pictures[1][1]) > 45


def test_meshes_keep_their_own_layout(mesh_folder: Path, tmp_path: Path, edit_here) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    picture.paste((200, 40, 40, 255), (12, 12, 36, 36))
    picture.save(folder / "a.png")
    out = str(tmp_path / "out")
    found = export_to(out, mesh_folder, "diffusers", images=str(folder), dtype="fp16")
    assert found["difference"] <= 3e-2 and found["dtype"] == "float16"
    row = registry.resolve(str(tmp_path / "out"))
    assert row.bundle is not None
    assert row.defaults == registry.resolve(str(mesh_folder)).defaults
    ran = edit_here(
        "export", mesh_folder, "--format", "diffusers", "--images", folder, "--shard-size", "1GB", "-o", "x",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 2 and "mesh models are one file" in ran.err
    assert not (tmp_path / "x").exists()


def test_half_precision_is_written_as_such(qwen_folder: Path, tmp_path: Path) -> None:
    found = export_to(tmp_path / "out", qwen_folder, "diffusers", dtype="bf16")
    file = next((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert found["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ordered_units_serve_narrow_mlps_better_and_come_back(case) -> None:
    model = case.transformer()
    calls = [case.inputs(2, 0.7, 0)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    narrow = narrow_error(model, case.spec, calls)
    undo = order_units(model, case.spec, calls)
    assert narrow_error(model, case.spec, calls) < narrow
    undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_lora_is_the_attached_one(case) -> None:
    model = case.transformer()
    targets = lora_targets(model, case.spec)
    undo = add_lora(model, targets, 2)
    torch.manual_seed(0)
    tensors = {n: 0.1 * torch.randn_like(p) for n, p in model.named_parameters() if ".lora_" in n}
    undo()
    weights = BackboneWeights("lora", tensors, 2, targets)
    dense = case.run(model)
    take_off = weights.apply(model)
    attached = case.run(model)
    take_off()
    names = set(model.state_dict())
    weights.merge(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(case.run(model), attached, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(case.run(model), dense, atol=1e-3)


BAD = [
    (["bundle", "--format", "reference"], "is not a checkpoint in the paper's layout (gate_mlps.* beside"),
    (["qwen", "--format", "reference"], "use --format bundle or diffusers"),
    (["release", "--format", "diffusers"], "only --format reference takes one"),
    (["release", "--format", "static", "--budget", "0.5"], "only --format reference takes one"),
    (["release"], "is one file already, or not a bundle"),
    (["torn", "--format", "reference"], "is truncated"),
    (["qwen", "--format", "diffusers", "--budget", "0.5"], "--budget does not apply to --format diffusers"),
    (["qwen", "--dtype", "fp16"], "--dtype does not apply to --format bundle, only to reference, diffusers"),
    (["release", "--format", "reference", "--dtype", "int8"], "--dtype 'int8' is unknown; allowed are auto"),
    (["release", "--format", "reference", "--shard-size", "big"], "--shard-size 'big' is not a size"),
    (["release", "--format", "reference", "--shard-size", "0GB"], "--shard-size '0GB' is not a size"),
    (
        ["qwen", "--format", "torch-export", "--budget", "1", "--shard-size", "1GB"],
        "--shard-size does not apply to --format torch-export, only to reference, diffusers, static",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message: str, qwen_folder: Path, tmp_path: Path, edit_here) -> None:
    release = RELEASES[0] / "weights.safetensors"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(release.read_bytes()[:100_000])
    places = {"qwen": qwen_folder, "bundle": qwen_folder / "routers", "release": release, "torn": torn}
    ran = edit_here("export", places[arguments[0]], "-o", "out", *arguments[1:], cwd=tmp_path)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert len(ran.said) == 1
    assert list(tmp_path.iterdir()) == [torn]
