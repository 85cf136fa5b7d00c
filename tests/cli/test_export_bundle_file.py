"""A bundle in one file equals the folder it was made from, and other files are refused in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from routers.attachment import architecture, fingerprint
from routers.bundle import DESCRIPTION, ENTRY, WEIGHTS, Bundle, load_bundle, pack
from tests.block_kinds import CASES
from tests.tiny_pipelines import plans_for

QUALITY = {"budget": 0.7, "spent": 0.701, "snr": 21.25, "time_ratio": 0.72}
DENSE = {"budget": 1.0, "spent": 1.0, "snr": 119.5, "time_ratio": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle for a transformer that nobody loads here."""
    case = next(case for case in CASES if case.name == "flux")
    model = case.transformer()
    times, plans = plans_for(4)
    Bundle(
        spec=case.spec,
        base_model="flux-test",
        architecture=architecture(model),
        fingerprint=fingerprint(model),
        num_steps=4,
        guidance=3.5,
        times=times,
        plans=plans,
        warps={"dense": (1.7, 1.3)},
        recommended_budget=0.7,
        metadata={"quality": [QUALITY, DENSE]},
    ).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_file_holds_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    pack(folder, file)
    one, several = load_bundle(file), load_bundle(folder)
    one.save(tmp_path / "again")
    for name in (DESCRIPTION, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert one.digest == several.digest
    assert one.path == str(file)
    assert one.warps == several.warps == {"dense": (1.7, 1.3)}
    for number, plan in one.plans["dense"].items():
        other = several.plans["dense"][number].to_arrays()
        assert all((array == other[name]).all() for name, array in plan.to_arrays().items())
    # a downloaded export folder is given as it is
    assert load_bundle(tmp_path).digest == several.digest


def foreign(file: Path) -> None:
    save_file({"w": torch.zeros(1)}, file)


def damaged(file: Path) -> None:
    file.write_bytes(b"this is not a safetensors file at all")


def other_description(file: Path) -> None:
    save_file({"w": torch.zeros(1)}, file, metadata={ENTRY: '{"format": 99}'})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "is not a bundle file: its header has no 'edit_bundle'"),
        (damaged, "is not a readable bundle"),
        (other_description, "format 99"),
    ],
)
def test_other_files_are_refused(make, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    make(file)
    with pytest.raises(ValueError, match=message) as caught:
        load_bundle(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_export_can_be_loaded_and_names_its_hashes(folder: Path, tmp_path: Path, edit_here) -> None:
    ran = edit_here("export", "bundle", "-o", "out", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.json["routers"] == load_bundle(folder).digest
    assert load_bundle(tmp_path / "out").digest == load_bundle(folder).digest
    manifest = json.loads((tmp_path / "out" / "edit-export.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == entry["sha256"]
    assert set(manifest["files"]) == {"README.md", "edit-routers.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| 0.7 | 0.701 | 21.25 | 0.72 |" in card
        and "| 1 | 1 | 119.5 | - |" in card
        and "--budget 0.7" in card
        and "at a compute budget up to 1\n(recommended: 0.7)" in card
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out"]

    before = (tmp_path / "out" / "edit-export.json").read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    refused = edit_here("export", "copy", "-o", "out", cwd=tmp_path)
    assert refused.code == 2 and "--output 'out' exists" in refused.err and "--overwrite" in refused.err
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "out" / "README.md").write_text("changed")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert edit_here("export", "bundle", "-o", "out", cwd=tmp_path).code == 0, "the same request"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "edit-export.json").read_bytes() == before
    assert (tmp_path / "out" / "README.md").read_text() == card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out"]


BAD = [
    (["bundle"], "no place to write to; give --output FOLDER"),
    (["bundle", "-o", "out", "--format", "gguf"], "--format 'gguf' is unknown; allowed are bundle"),
    (["bundle", "-o", "bundle", "--overwrite"], "--output 'bundle' exists and holds no export"),
    (["no-bundle", "-o", "out"], "is not a model folder"),
    (["a.safetensors", "-o", "out"], "is one file already, or not a bundle"),
    (["broken", "-o", "out"], "is not a bundle folder: routers.safetensors is missing"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments: list[str], message: str, folder: Path, tmp_path: Path, edit_here) -> None:
    (tmp_path / "no-bundle").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bundle.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    ran = edit_here("export", *arguments, cwd=tmp_path)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.said) == 1
    assert sorted(tmp_path.rglob("*")) == before
