"""`edit config`: what the files of presets say."""

from __future__ import annotations

from rich.text import Text

from edit_cli.commands import presets
from edit_cli.console import print_json, stdout
from edit_cli.options import CONFIG
from edit_cli.request import Request, command


@command(CONFIG)
def config(request: Request) -> None:
    """Show the presets of ~/.config/edit.toml and ./edit.toml, and which file each value is from.

    A preset is a heading in brackets with options below it, named as they are typed:

    [dim][fast]
    budget = 0.4
    steps = 12
    edit generate "a cat" --preset fast[/dim]

    Those under `default` hold in every run that does not repeat a file (--from). What is typed wins over a
    preset, a named preset over `default`, and the folder's file over the user's.
    """
    found, files = presets.read_presets(), presets.places()
    if "json" in request:
        shown = {
            name: {key: {"value": s.value, "file": str(s.file)} for key, s in keys.items()}
            for name, keys in found.items()
        }
        print_json({"files": [str(file) for file in files if file.is_file()], "presets": shown})
        return
    for file in files:
        state = "" if file.is_file() else "  (not there)"
        stdout().print(Text.assemble(str(file), (state, "dim")), soft_wrap=True)
    for name, keys in found.items():
        stdout().print(Text(f"\n[{name}]", "bold"))
        for key, setting in keys.items():
            stdout().print(Text.assemble(f"{key} = {setting.value!r}", (f"  # {setting.file}", "dim")))
    if not found:
        stdout().print(
            Text("no presets; write [fast] and budget = 0.4 into edit.toml for --preset fast", "dim")
        )
