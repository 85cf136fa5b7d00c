"""The table of known models, and `resolve`: registry name, folder or hub id -> Backbone. No torch here.

Folders and hub ids are recognised by the pipeline class in their `model_index.json`; packaged models are
folders like any other. A folder may hold `edit.json` ({"width": 128, "steps": 20, ...}: defaults for
requests) and `routers/` (a bundle used by default).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import socket
import struct
import urllib.parse
import urllib.request
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from backbones import flux, qwen_image
from backbones.spec import PACKAGE_FOLDER, Backbone, Config, Defaults, Family

FAMILIES: tuple[Family, ...] = (qwen_image.FAMILY, flux.FAMILY)

GIB = 2**30
ROUTERS_FOLDER = "routers"
SMALL_MODEL = 10**9
"""Below this many parameters a model runs in fp32 by default and may generate several images at once."""


class ModelNotFoundError(ValueError):
    """No such model, or a folder that is none; the message is one line for the user."""


def _hub(name: str, family: Family, source: str, **row: Any) -> Backbone:
    config = read_packaged_config(name)
    return Backbone(
        name=name,
        family=family,
        source=source,
        defaults=row.pop("defaults", family.defaults(config["transformer"])),
        size_multiple=family.size_multiple(config["vae"]),
        memory_gib=round(2 * row["parameters"] / GIB, 1),
        **row,
    )


def _packaged(name: str, family: Family, folder: str, licence: str, summary: str) -> Backbone | None:
    path = PACKAGE_FOLDER / folder
    if not (path / "model_index.json").is_file():
        return None  # a source checkout before the weights were trained
    return replace(
        _from_folder(path), name=name, family=family, licence=licence, packaged=True, summary=summary
    )


def read_packaged_config(name: str) -> dict[str, Config]:
    """Component configs of a hub row ("transformer", "vae"), shipped so that dry runs need no download."""
    data: dict[str, Config] = json.loads((PACKAGE_FOLDER / "configs" / f"{name}.json").read_text())
    return data


DEFAULT_MODEL = "qwen-image-tiny"


def rows() -> dict[str, Backbone]:
    """The registry, by name, in the order `edit models` shows it."""
    table = (
        _packaged(
            "qwen-image-tiny",
            qwen_image.FAMILY,
            "tiny/qwen_image_tiny",
            licence="Apache-2.0; trained on Apache-2.0, MIT and CC-BY-4.0 art",
            summary="trained from scratch on emoji art; runs on any CPU",
        ),
        _packaged(
            "flux-tiny",
            flux.FAMILY,
            "tiny/flux_tiny",
            licence="Apache-2.0; trained on Apache-2.0, MIT and CC-BY-4.0 art",
            summary="trained from scratch on emoji art; runs on any CPU",
        ),
        _hub(
            "qwen-image",
            qwen_image.FAMILY,
            "Qwen/Qwen-Image",
            licence="Apache-2.0",
            parameters=28_849_000_000,
            transformer_parameters=20_430_401_088,
            summary="20 B dual-stream DiT, Qwen2.5-VL 7B text encoder",
        ),
        _hub(
            "flux-dev",
            flux.FAMILY,
            "black-forest-labs/FLUX.1-dev",
            licence="FLUX.1 [dev] Non-Commercial",
            parameters=16_870_000_000,
            transformer_parameters=11_901_408_320,
            summary="12 B double + single stream DiT, T5-XXL and CLIP; gated on the hub",
        ),
        _hub(
            "flux-schnell",
            flux.FAMILY,
            "black-forest-labs/FLUX.1-schnell",
            licence="Apache-2.0",
            parameters=16_860_000_000,
            transformer_parameters=11_891_178_560,
            summary="FLUX.1 distilled to 1-4 steps",
        ),
    )
    return {row.name: row for row in table if row is not None}


def resolve(name_or_path: str) -> Backbone:
    """A registry name, a pipeline folder or a hub id -> its Backbone.

    Only a hub id outside the registry may touch the network. Raises ModelNotFoundError.
    """
    table = rows()
    if name_or_path in table:
        return table[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.exists():
        same = (row for row in table.values() if row.folder is not None and row.folder == path.resolve())
        return next(same, None) or _from_folder(path.resolve())
    by_source = next((row for row in table.values() if row.source == name_or_path), None)
    if by_source is not None:
        return by_source
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelNotFoundError(
            f"model folder {name_or_path!r} does not exist; give a pipeline folder, or see `edit models`"
        )
    if "/" in name_or_path:
        return _from_hub(name_or_path)
    from backbones import mesh_registry  # it imports this module

    if name_or_path in mesh_registry.rows():
        raise ModelNotFoundError(f"{name_or_path!r} makes meshes: use `edit generate-3d -m {name_or_path}`")
    near = difflib.get_close_matches(name_or_path.lower(), table, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(table)};"
    raise ModelNotFoundError(
        f"unknown model {name_or_path!r}; {hint} A pipeline folder or a hub id (owner/name) works too"
    )


def component_config(backbone: Backbone, component: str) -> Config:
    """`config.json` of a component ("transformer", "vae"), without loading weights."""
    if backbone.folder is not None:
        return read_json(backbone.folder / component / "config.json")
    if (PACKAGE_FOLDER / "configs" / f"{backbone.name}.json").is_file():
        return read_packaged_config(backbone.name)[component]
    return read_json(_hub_file(backbone.source, f"{component}/config.json"))


def component_parameters(backbone: Backbone) -> dict[str, int]:
    """Parameters per component: from the weight files of a folder, else the registry's totals."""
    if backbone.folder is None:
        rest = backbone.parameters - backbone.transformer_parameters
        return {"transformer": backbone.transformer_parameters, "text encoder and VAE": rest}
    return _folder_parameters(backbone.folder)


def _from_folder(folder: Path) -> Backbone:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelNotFoundError(
            f"{str(folder)!r} is no pipeline folder: it has no model_index.json; see `edit models`"
        )
    family = _family(read_json(index), str(folder))
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    counts = _folder_parameters(folder)
    parameters = sum(counts.values())
    small = 0 < parameters < SMALL_MODEL
    bundle = folder / ROUTERS_FOLDER
    return Backbone(
        name=folder.name,
        family=family,
        source=str(folder),
        licence="see the model's own card",
        parameters=parameters,
        transformer_parameters=counts.get("transformer", 0),
        memory_gib=round((4 if small else 2) * parameters / GIB, 2),
        defaults=_folder_defaults(folder, family.defaults(transformer)),
        size_multiple=family.size_multiple(vae),
        bundle=bundle if (bundle / "bundle.json").is_file() else None,
        batch_size=8 if small else 1,
    )


def _from_hub(repository: str) -> Backbone:
    family = _family(read_json(_hub_file(repository, "model_index.json")), repository)
    transformer, vae = (
        read_json(_hub_file(repository, f"{part}/config.json")) for part in ("transformer", "vae")
    )
    return Backbone(
        name=repository,
        family=family,
        source=repository,
        licence="see the model's own card",
        parameters=0,
        transformer_parameters=0,
        memory_gib=0.0,
        defaults=family.defaults(transformer),
        size_multiple=family.size_multiple(vae),
    )


def _folder_defaults(folder: Path, base: Defaults) -> Defaults:
    file = folder / "edit.json"
    if not file.is_file():
        return base
    data = read_json(file)
    unknown = set(data) - {f.name for f in fields(Defaults)}
    if unknown:
        raise ModelNotFoundError(
            f"{file}: unknown keys {sorted(unknown)}; "
            f"allowed are {', '.join(f.name for f in fields(Defaults))}"
        )
    return replace(base, **data)


def _family(index: Config, where: str) -> Family:
    name = index.get("_class_name")
    for family in FAMILIES:
        if name == family.pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES)
    raise ModelNotFoundError(f"{where!r} holds a {name}, which `edit` cannot run; it knows {known}")


def _hub_file(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        require_hub()
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client has a dozen error types; the user needs one line
        raise ModelNotFoundError(hub_message(repository, error)) from error


def require_hub() -> None:
    """Raise OSError at once when the hub cannot be reached; its client would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("offline mode")
    if urllib.request.getproxies():
        return  # behind a proxy the host need not resolve here
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    with socket.create_connection((host.hostname or "", host.port or 443), timeout=10):
        pass


def hub_message(repository: str, error: BaseException) -> str:
    """Why a hub model could not be read, in one line with the next step."""
    kind = type(error).__name__
    if "Gated" in kind or "401" in str(error) or "403" in str(error):
        return f"{repository!r} is gated: accept its licence on the hub and run `hf auth login`"
    if "RepositoryNotFound" in kind or "404" in str(error):
        return f"{repository!r} was not found, neither as a folder nor on the hub; see `edit models`"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return (
        f"{repository!r} is not in the local cache and the hub cannot be reached{offline}; "
        "download it first, or give a pipeline folder"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelNotFoundError."""
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelNotFoundError(f"the model folder is incomplete: {str(file)!r} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelNotFoundError(f"{str(file)!r} holds no JSON object")
    return data


def _folder_parameters(folder: Path) -> dict[str, int]:
    """Parameters per component of a pipeline folder."""
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        if file.parent.name != ROUTERS_FOLDER:
            counts[file.parent.name] = counts.get(file.parent.name, 0) + sum(count_by_prefix(file).values())
    return counts


def count_by_prefix(file: Path) -> dict[str, int]:
    """Elements in a safetensors file by the first part of their names.

    Read from its header alone (8 bytes little-endian length, then JSON). Raises ModelNotFoundError.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise ModelNotFoundError(f"{str(file)!r} is no complete safetensors file: {error}") from error
    counts: dict[str, int] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            prefix = name.split(".", 1)[0]
            counts[prefix] = counts.get(prefix, 0) + math.prod(entry["shape"])
    return counts
