"""Help without rich, which takes longer to import than to read: options by heading, none of them cut."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import typer

COLUMN = 28
"""Where what an option means begins; longer ones have it on the next line."""
WIDEST = 100


def write_command(command: Any, ctx: Any, formatter: Any) -> None:
    """Usage, what a command does, its options under their headings."""
    text, examples = split(command.help or "")
    named: list[Any] = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(a.metavar if a.required else f"[{a.metavar}]" for a in named)
    formatter.write(f"Usage: {ctx.command_path} {usage}{' ' if usage else ''}[OPTIONS]\n\n{text}\n")
    formatter.write(_indented(examples))
    _write_rows(formatter, "Arguments", [(a.metavar, a.help or "") for a in named])
    _write_options(formatter, command.params)


def write_group(group: Any, summaries: Mapping[str, str], examples: str, formatter: Any) -> None:
    """What commands there are, and how they are typed."""
    formatter.write(f"Usage: edit COMMAND [...]\n\n{group.help}\n")
    _write_rows(formatter, "Commands", summaries.items())
    formatter.write(f"\n{bold('Examples:')}\n{_indented(examples, '')}")
    _write_options(formatter, group.params)
    formatter.write("\n`edit COMMAND --help` tells the options of one.\n")


def split(text: str) -> tuple[str, str]:
    """What a command does, and its examples."""
    told, _, examples = inspect.cleandoc(text).partition("[dim]")
    return plain(told).strip(), plain(examples).strip()


def plain(text: str) -> str:
    """Without markup; a default stands in brackets."""
    text = re.sub(r"\[dim\](default[^\[]*)\[/\]", r"(\1)", text)
    return re.sub(r"\[/?(dim)?\]", "", text)


def told(option: Any) -> str:
    """What an option means, with its default."""
    text, shown = plain(option.help or ""), option.show_default
    if isinstance(shown, str) or (shown is True and isinstance(option.default, str)):
        text += f" (default {shown if isinstance(shown, str) else option.default})"
    return text


def spelling(option: Any) -> str:
    """All spellings of an option and its value: "--budget, -b X"."""
    names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or option.name.upper()}"


def bold(text: str) -> str:
    """Bold on a terminal."""
    plainly = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plainly else typer.style(text, bold=True)


def _write_options(formatter: Any, params: Any) -> None:
    options = [p for p in params if p.param_type_name == "option" and not p.hidden]
    for panel in dict.fromkeys(p.rich_help_panel for p in options):
        rows = [(spelling(p), told(p)) for p in options if p.rich_help_panel == panel]
        _write_rows(formatter, panel or "Options", rows)


def _write_rows(formatter: Any, title: str, rows: Any) -> None:
    """Two columns under a heading."""
    if not rows:
        return
    width = max(min(shutil.get_terminal_size().columns, WIDEST), 50)
    formatter.write(f"\n{bold(title + ':')}\n")
    for name, text in rows:
        lines = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False) or [""]
        first = f"  {name}".ljust(COLUMN)
        if len(first) > COLUMN or not first.endswith(" "):
            formatter.write("\n".join(textwrap.wrap(first, width, subsequent_indent="    ")) + "\n")
            first = " " * COLUMN
        formatter.write(f"{first}{lines[0]}\n")
        formatter.write("".join(f"{' ' * COLUMN}{line}\n" for line in lines[1:]))


def _indented(text: str, before: str = "\n") -> str:
    return before + textwrap.indent(text, "  ") + "\n" if text else ""
