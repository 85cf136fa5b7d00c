"""Presets: options by name in `edit.toml`, of the user and of the current folder. Torch-free.

    [fast]                 # edit generate "a cat" --preset fast
    budget = 0.4
    solver = "ab2"

    [default]              # holds where nothing else is said
    model = "flux-tiny"

A key is an option's long name. What is typed wins over the named preset, that over a replayed record, and
that over `default`; the folder's file wins over the user's.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import EditError

if TYPE_CHECKING:
    from edit_cli.request import Option, Options

FILE = "edit.toml"
DEFAULT = "default"
"""The preset that needs no naming; a replay (`--from`) does without."""
NEVER = ("preset", "replay", "yes", "overwrite", "resume")
"""What says how one run goes on belongs to that run."""


@dataclass(frozen=True)
class Setting:
    """A value as it stands in a file, and which."""

    value: Any
    file: Path

    def where(self, preset: str, key: str) -> str:
        """The place for messages."""
        return f"{self.file}: [{preset}] {key}"


Presets = Mapping[str, Mapping[str, Setting]]
"""Settings by preset and key."""


def places() -> tuple[Path, ...]:
    """Where the files may be, in rising order; the first is the user's."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path("~/.config").expanduser()
    return base / FILE, Path(FILE)


def read_presets() -> Presets:
    """All presets. Raises EditError naming file and key for what no command knows."""
    presets: dict[str, dict[str, Setting]] = {}
    for file in places():
        for preset, table in _read(file).items():
            if not isinstance(table, dict):
                raise EditError(f"{file}: {preset} stands outside of a preset; put it under [{DEFAULT}]")
            for key, value in table.items():
                if key not in _known:
                    raise EditError(f"{file}: [{preset}] {key} is unknown; {_near(key, _known)}")
                name = _known[key][0][0]
                presets.setdefault(preset, {})[name] = Setting(value, file)
                _check(file, preset, key, value, [option for _, option in _known[key]])
            presets.setdefault(preset, {})
    return presets


def settings(options: Options, preset: str | None, typed: Container[str]) -> dict[str, Any]:
    """Checked values by option of one command, from `default` and a named preset. Raises EditError.

    Keys that are other commands' are left out, and what was typed. Where a record is replayed, it says what
    `default` would.
    """
    if not any(place.is_file() for place in places()):
        if preset is not None:
            raise EditError(
                f"--preset {preset!r}: there is neither {places()[0]} nor ./{FILE}; "
                f"write one: [{preset}] on a line, then options like budget = 0.4"
            )
        return {}
    presets = read_presets()
    if preset is not None and preset not in presets:
        raise EditError(f"--preset {preset!r} is unknown; known are {', '.join(presets) or 'none'}")
    chosen = [] if "replay" in typed else [DEFAULT]
    values = {}
    for name in [*chosen, *([preset] if preset else [])]:
        for key, setting in presets.get(name, {}).items():
            if key in options and key not in NEVER and key not in typed:
                values[key] = _listed(options[key], setting.where(name, key), setting.value)
    return {key: value for key, value in values.items() if value is not False}


_known: dict[str, list[tuple[str, Option]]] = {}


def allow(options: Options) -> None:
    """Let files hold these options, by every way that they may be called. Called by the table of options."""
    for name, option in options.items():
        if option.is_argument or name in NEVER:
            continue
        long = [text.lstrip("-") for text in option.spellings if text.startswith("--")]
        for key in {name, *long, *(text.replace("-", "_") for text in long)}:
            _known.setdefault(key, []).append((name, option))


def preset_names() -> list[str]:
    """Names of all presets."""
    return list(dict.fromkeys(name for file in places() for name in _read(file)))


def _listed(option: Option, where: str, value: Any) -> Any:
    """The checked value, a list where the option takes several."""
    checked = option.value(where, value)
    return checked if not option.many or isinstance(checked, list) else [checked]


def _check(file: Path, preset: str, key: str, value: Any, options: list[Option]) -> None:
    """A value must do for one of the commands. Raises EditError."""
    where, errors = f"{file}: [{preset}] {key}", []
    for option in options:
        if isinstance(value, bool) != (option.check is None):
            wanted = "true or false" if option.check is None else f"a value, {option.metavar}"
            errors.append(EditError(f"{where} {value!r} is not what it takes: {wanted}"))
            continue
        if isinstance(value, list) and not option.many:
            errors.append(EditError(f"{where} {value!r} is a list; give one value"))
            continue
        try:
            _listed(option, where, value)
        except EditError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found,no-redef,unused-ignore]

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise EditError(f"{file} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise EditError(f"{file} cannot be read: {reason}; mend or move it") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise EditError(f"{file} is not TOML: {error}") from None


def _near(key: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else "keys are options' long names; see `edit generate --help`"
