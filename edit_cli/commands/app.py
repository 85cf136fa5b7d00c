"""`edit` itself: its commands, each imported when it is called, and the words that they are called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from edit_cli import __version__
from edit_cli.errors import EditError

if TYPE_CHECKING:
    from edit_cli.request import Command, Option


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


COMMANDS = Commands(
    {
        "generate": "Pictures from prompts, at a share of the model's compute.",
        "generate-3d": "Meshes from pictures, at a share of the model's compute.",
        "models": "What can be generated with, and what of it is on this machine.",
        "download": "Fetch a model from the hub, or the rest of it.",
        "config": "What your edit.toml files say.",
        "calibrate": "Fit a bundle to a model, so that a budget costs less likeness.",
        "profile": "Where the compute goes: blocks, steps, stages.",
        "export": "Take routers or a model elsewhere, checked by loading it again.",
    }
)
"""The commands with what `edit --help` says of them, in its order."""
EXAMPLES = """edit generate "a cat" --budget 0.6 -o cat.png
edit generate "a cat" --budget 0.5 --compare   # beside the dense picture
edit generate-3d cat.png -o cat.glb            # a mesh of it
edit generate "a cat" --preset fast            # options saved in edit.toml
edit models qwen-image-tiny                    # what a model makes and needs"""


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
        from edit_cli.commands.help import write_command

        write_command(self, ctx, formatter)


class EditGroup(TyperGroup):
    """`edit` itself."""

    def get_params(self, ctx: Any) -> Any:
        """As of a command."""
        params = super().get_params(ctx)
        as_typed(params)
        return params

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One, imported now."""
        if cmd_name not in self.commands and cmd_name in COMMANDS:
            one = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            one.command(cmd_name, cls=EditCommand, context_settings=dict(self.context_settings))(
                COMMANDS[cmd_name]
            )
            self.commands[cmd_name] = typer.main.get_command(one)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """With a guess at what an unknown name was meant to be."""
        import difflib

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Names and summaries, without importing the commands."""
        from typer._click.shell_completion import CompletionItem

        summaries = COMMANDS.summaries.items()
        return [CompletionItem(name, help=text) for name, text in summaries if name.startswith(incomplete)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What there is, and how it is typed."""
        from edit_cli.commands.help import write_group

        write_group(self, COMMANDS.summaries, EXAMPLES, formatter)


app = typer.Typer(
    name="edit",
    cls=EditGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(show: bool) -> None:
    """Callback of `--version`."""
    if show:
        print(f"edit {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    show_version: bool = typer.Option(
        False, "--version", metavar="", callback=version, is_eager=True, help="Print the version."
    ),
) -> None:
    """One diffusion transformer, any compute budget."""


def call(arguments: Sequence[str]) -> Any:
    """Run the command that is typed. Raises what it raises, and Typer's own errors."""
    words, command = list(arguments), COMMANDS.get(next(iter(arguments), ""))
    if command is not None:
        words = [words[0], *spread(words[1:], command)]
    return typer.main.get_command(app).main(words or ["--help"], prog_name="edit", standalone_mode=False)


def spread(words: Sequence[str], command: Command) -> list[str]:
    """`--seed 1 2 3` -> `--seed 1 --seed 2 --seed 3`: option parsers take one value for each name.

    A further word belongs to the option if it could be a value of it: a number is never a prompt.
    """
    result: list[str] = []
    current, rest = "", list(words)
    while rest:
        word = rest.pop(0)
        typed, inline, _ = word.partition("=")
        if word == "--":
            result += [word, *rest]
            rest.clear()
        elif typed in command.spelled:
            _, option = command.spelled[typed]
            takes_next = option.check is not None and not inline
            if takes_next and option.bare and not (rest and _accepts(option, rest[0])):
                rest.insert(0, option.bare)
            result += [word, *([rest.pop(0)] if takes_next and rest else [])]
            current = typed if option.many and option.metavar.endswith("...") else ""
        elif current and not word.startswith("-") and _accepts(command.spelled[current][1], word):
            result += [current, word]
        else:
            current = ""
            result.append(word)
    return result


def _accepts(option: Option, word: str) -> bool:
    try:
        option.value(option.label, word)
    except EditError:
        return False
    return True
