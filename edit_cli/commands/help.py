"""Help without rich, which takes longer to import than to read: options by heading, none of them cut.

Also the group whose commands are imported when they are called.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from edit_cli.request import Command

COLUMN = 28
"""Where what an option means begins; longer ones have it on the next line."""
WIDEST = 100


class Commands(Mapping[str, "Command"]):
    """Commands by name, each imported from `edit_cli.commands` when it is asked for."""

    def __init__(self, summaries: Mapping[str, str]) -> None:
        self.summaries = summaries

    def __getitem__(self, name: str) -> Command:
        if name not in self.summaries:
            raise KeyError(name)
        function = name.replace("-", "_")
        command: Command = getattr(import_module(f"edit_cli.commands.{function}"), function)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self.summaries)

    def __len__(self) -> int:
        return len(self.summaries)


class _AsTyped:
    """Gives Typer every value as it was typed: our options are text or switches, and are checked later.

    Typer would import pydantic and build a schema for each option, which takes longer than `edit models`.
    """

    def coerce(self, value: Any, **_: Any) -> Any:
        return value


def as_typed(params: Iterable[Any]) -> None:
    """Spare Typer the schemas of these parameters."""
    for param in params:
        param._runtime_param = _AsTyped()


class EditCommand(TyperCommand):
    """A command with our help."""

    def get_params(self, ctx: Any) -> Any:
        """Those of the command, and `--help`."""
        params = super().get_params(ctx)
        as_typed(params)
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what it does, its options under their headings."""
        text, examples = split(self.help or "")
        named: list[Any] = [p for p in self.params if p.param_type_name == "argument"]
        usage = " ".join(a.metavar if a.required else f"[{a.metavar}]" for a in named)
        formatter.write(f"Usage: {ctx.command_path} {usage}{' ' if usage else ''}[OPTIONS]\n\n{text}\n")
        formatter.write(_indented(examples))
        _write_rows(formatter, "Arguments", [(a.metavar, a.help or "") for a in named])
        _write_options(formatter, self.params)


class EditGroup(TyperGroup):
    """`edit` itself."""

    all_commands: Commands
    examples = ""

    def get_params(self, ctx: Any) -> Any:
        """As of a command."""
        params = super().get_params(ctx)
        as_typed(params)
        return params

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return list(self.all_commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One, imported now."""
        if cmd_name not in self.commands and cmd_name in self.all_commands:
            one = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            one.command(cmd_name, cls=EditCommand, context_settings=dict(self.context_settings))(
                self.all_commands[cmd_name]
            )
            self.commands[cmd_name] = typer.main.get_command(one)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """With a guess at what an unknown name was meant to be."""
        import difflib

        if args and args[0] not in self.all_commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.all_commands, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.all_commands)}"
            ctx.fail(f"No such command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Names and summaries, without importing the commands."""
        from typer._click.shell_completion import CompletionItem

        summaries = self.all_commands.summaries.items()
        return [CompletionItem(name, help=text) for name, text in summaries if name.startswith(incomplete)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What there is, and how it is typed."""
        formatter.write(f"Usage: edit COMMAND [...]\n\n{self.help}\n")
        _write_rows(formatter, "Commands", self.all_commands.summaries.items())
        formatter.write(f"\n{bold('Examples:')}\n{_indented(self.examples, '')}")
        _write_options(formatter, self.params)
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
