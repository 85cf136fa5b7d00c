"""Static and torch-export exports of the tiny random pipelines: written, loaded again, run elsewhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from backbones import loading, registry
from backbones.spec import Placement
from edit_cli.errors import EditError
from edit_cli.export import program as export_torch
from edit_cli.export import static as export_static
from routers.packed import out_features
from tests.cli.test_export_formats import export_to


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one picture of an object on white."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    picture.paste((200, 40, 40, 255), (12, 12, 36, 36))
    picture.save(folder / "a.png")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples and one round; what is measured is not the subject here."""
    monkeypatch.setattr("edit_cli.export.source.SAMPLES", 1)
    monkeypatch.setattr("edit_cli.export.source.STEPS", 2)
    monkeypatch.setattr(export_static, "ROUNDS", 1)


def check_manifest(folder: Path) -> dict:
    manifest = json.loads((folder / "edit-export.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
    return manifest


@pytest.mark.parametrize("name", [pytest.param("qwen_folder", marks=pytest.mark.slow), "flux_folder"])
def test_static_pictures(name: str, request, tmp_path: Path, edit_here) -> None:
    source = request.getfixturevalue(name)
    out = tmp_path / "small"
    said: list[str] = []
    found = export_to(out, source, "static", budget=0.6, say=said.append)
    assert [text for text in said if text.startswith("choosing what to leave out: ")]
    assert found["difference"] <= 1e-5
    assert 0.3 < found["flops"] <= 0.6
    assert found["parameters"]["static"] < found["parameters"]["dense"]
    assert [row["variant"] for row in found["measured"]] == ["dense", "dynamic", "static"]
    assert check_manifest(out)["dropped"] == found["dropped"]
    assert "| static |" in (out / "README.md").read_text()
    assert "The dynamic model, with a bundle, is" in (out / "README.md").read_text()
    assert Image.open(out / "comparison.png").width > 600
    texts = [file.read_text() for file in out.rglob("*.json")]
    assert not any(str(source) in text for text in texts), "no paths of this machine"

    backbone = registry.resolve(str(out))
    assert backbone.defaults == registry.resolve(str(source)).defaults
    assert backbone.bundle is None
    transformer = loading.load(backbone, Placement(dtype="fp32")).transformer
    assert sum(p.numel() for p in transformer.parameters()) == found["parameters"]["static"]
    assert backbone.transformer_parameters == found["parameters"]["static"]

    planned = edit_here("generate", "a cat", "-m", out, "--dry-run", "--json", cwd=tmp_path)
    dense = edit_here(
        "generate", "a cat", "-m", source, "--routers", "none", "--dry-run", "--json", cwd=tmp_path
    )
    assert planned.code == 0, planned.err
    ratio = planned.json["flops"]["dense"] / dense.json["flops"]["dense"]
    assert ratio == pytest.approx(found["flops"], abs=0.05)  # other text lengths than when it was frozen
    ran = edit_here("generate", "a cat", "-m", out, "-o", "cat.png", cwd=tmp_path)
    assert ran.code == 0, ran.err

    again = edit_here("export", out, "--format", "static", "--budget", "0.5", "-o", "x", cwd=tmp_path)
    assert again.code == 2 and "is a static model already" in again.err
    state = json.loads((out / "edit.json").read_text())
    path = next(iter(state["static"]))
    state["static"][path]["units"][0] = [10**6]
    (out / "edit.json").write_text(json.dumps(state))
    broken = edit_here("generate", "a cat", "-m", out, cwd=tmp_path)
    assert broken.code == 2 and "asks for 1000000 hidden units" in broken.err
    assert len(broken.said) == 1


def test_static_mesh(mesh_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Both lists have one block, so nothing can be dropped and all is saved by widths."""
    out = tmp_path / "small"
    found = export_to(out, mesh_folder, "static", budget=0.9, images=str(pictures))
    assert found["dropped"] == [] and found["widths"]
    assert found["difference"] <= 1e-5
    check_manifest(out)
    assert registry.resolve(str(out)).transformer_parameters == found["parameters"]["static"]
    from backbones.hunyuan3d.checkpoints import load_pipeline

    block = load_pipeline(str(out)).transformer.double_blocks[0]
    narrowest = min(found["widths"].values())
    sizes = [out_features(block.img_mlp[0]) / 128]
    assert narrowest in sizes or found["widths"].get("1") == narrowest
    with pytest.raises((EditError, ValueError), match=r"a static model of budget 0\.1 is not possible"):
        export_to(tmp_path / "no", mesh_folder, "static", budget=0.1, images=str(pictures))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "budget"), [("qwen_folder", 1.0), ("flux_folder", 0.7)])
def test_program_gives_the_same_elsewhere(name: str, budget: float, request, tmp_path: Path) -> None:
    source = request.getfixturevalue(name)
    out = tmp_path / "program"
    found = export_to(out, source, "torch-export", budget=budget, batch_size=2, text_tokens=7)
    assert found["difference"] < 1e-4
    assert found["inputs"][0]["shape"][0] == 2 and found["inputs"][1]["shape"][1] == 7
    assert check_manifest(out)["inputs"] == found["inputs"]
    program = torch.export.load(out / "transformer.pt2").module()
    inputs = [torch.zeros(i["shape"]) for i in found["inputs"]]
    assert program(*inputs).isfinite().all()


@pytest.mark.slow
def test_program_of_a_mesh_model(mesh_folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "program")
    found = export_to(out, mesh_folder, "torch-export", budget=1.0, images=str(pictures))
    assert found["difference"] < 1e-4
    assert [i["name"] for i in found["inputs"]] == ["x", "t", "contexts.main"]


@pytest.mark.slow
def test_wrong_program_is_not_kept(qwen_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The check is a real one: a program of other weights is found out."""
    write = export_torch.write_program

    def spoiled(call, tensors, file):
        with torch.no_grad():
            call.transformer.proj_out.bias += 1
            write(call, tensors, file)
            call.transformer.proj_out.bias -= 1

    monkeypatch.setattr(export_torch, "write_program", spoiled)
    with pytest.raises(EditError, match="the exported program differs by") as caught:
        export_to(tmp_path / "p", qwen_folder, "torch-export", budget=1.0, text_tokens=4)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_check_holds_one_transformer_beside_the_model(flux_folder, tmp_path: Path, monkeypatch) -> None:
    """A second pipeline would need a card with room for both, and its text encoders say nothing."""
    from diffusers import DiffusionPipeline

    from edit_cli.export import static

    loaded, own = [], DiffusionPipeline.from_pretrained.__func__
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", classmethod(lambda *a, **k: loaded.append(1) or own(*a, **k))
    )
    write = static.save_model

    def spoiled(source, transformer, *args):
        write(source, transformer, *args)
        with torch.no_grad():
            transformer.proj_out.bias += 1

    monkeypatch.setattr(static, "save_model", spoiled)
    with pytest.raises(EditError, match="the written model differs by 1 when loaded") as caught:
        export_to(tmp_path / "p", flux_folder, "static", budget=0.7)
    assert caught.value.exit_code == 1 and len(loaded) == 1
    assert list(tmp_path.iterdir()) == []


BAD = [
    (["--format", "static"], "this format freezes one budget; give --budget B"),
    (["--format", "static", "--budget", "x"], "--budget 'x' is not a number; it is the share of"),
    (["--format", "static", "--budget", "1"], "--budget 1 leaves nothing out; give a --budget below 1"),
    (
        ["--format", "torch-export", "--budget", "1.5"],
        "--budget '1.5' is out of range; it is the share of",
    ),
    (["--format", "bundle", "--budget", "0.5"], "--budget does not apply to --format bundle"),
    (
        ["--format", "static", "--budget", "0.7", "--batch-size", "2"],
        "--batch-size does not apply to --format static, only to torch-export",
    ),
    (["--format", "static", "--budget", "0.7", "--prompts", "no.txt"], "--prompts 'no.txt' cannot be read"),
    (["--format", "static", "--budget", "0.7", "--images", "."], "--images is for models that make meshes"),
    (["--format", "torch-export", "--budget", "1", "--batch-size", "0"], "--batch-size"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments: list[str], message: str, qwen_folder: Path, tmp_path: Path, edit_here) -> None:
    ran = edit_here("export", qwen_folder, "-o", "out", *arguments, cwd=tmp_path)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []
