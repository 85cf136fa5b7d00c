"""How a table of options becomes commands, and what was typed a checked Request. Torch-free."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import typer

Check = Callable[[str, Any], Any]
"""(place for the message, text or JSON value) -> the value. Raises EditError."""


@dataclass(frozen=True)
class Option:
    """One option of `edit`: how it is typed, what help says, how its text becomes a value.

    names: its spellings, the first is used in messages; without dashes it is a positional argument.
    check: None for a switch. many: may be given several times; where the metavar ends with "...", several
    values may follow the name. line: whether it may stand in a JSON line of an input list, as a value or a
    list. bare: what it means where no value follows. default: typed where nothing is; shown: the default as
    help tells it. instead: of an argument that has to be given, the options that may take its place. panel:
    heading in help. complete: what a shell may complete a value to; default: the words of its choice.
    """

    names: str
    metavar: str = ""
    help: str = ""
    check: Check | None = None
    many: bool = False
    line: Literal["", "value", "list"] = ""
    bare: str = ""
    default: str | None = None
    shown: str | bool = False
    instead: tuple[str, ...] | None = None
    panel: str | None = None
    complete: Callable[[], Iterable[str]] | None = None

    @property
    def is_argument(self) -> bool:
        """Whether it is positional."""
        return not self.names.startswith("-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """How it can be typed."""
        return () if self.is_argument else tuple(self.names.split())

    @property
    def label(self) -> str:
        """What messages call it: "--budget", "PROMPT"."""
        return self.metavar.rstrip(".") if self.is_argument else self.names.split()[0]

    def value(self, where: str, given: Any) -> Any:
        """The checked value of something recorded or read from a line. Raises EditError."""
        if self.check is None:
            return bool(given)
        if self.many and isinstance(given, (list, tuple)):
            return [self.check(where, each) for each in given]
        return self.check(where, given)

    def parameter(self, name: str, lines: bool) -> inspect.Parameter:
        """What Typer reads it from. lines: whether the command takes JSON lines."""
        kind: Any = bool if self.check is None else list[str] | None if self.many else str | None
        default: Any = False if self.check is None else self.default
        if self.is_argument:
            info: Any = typer.Argument(metavar=self.metavar, help=self.help, autocompletion=self.completion())
            default = default if self.many else inspect.Parameter.empty
        else:
            text = f"{self.help} *" if self.line and lines else self.help
            shown = self.shown or self.default is not None
            info = typer.Option(
                *self.spellings, metavar=self.metavar, help=text, rich_help_panel=self.panel,
                show_default=shown, autocompletion=self.completion(),
            )  # fmt: skip
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, info])

    def completion(self) -> Callable[[str], list[str]] | None:
        """What Typer asks for the words that a value may begin."""
        words = self.complete or (lambda: getattr(self.check, "allowed", ()))
        if self.complete is None and not words():
            return None

        def complete(incomplete: str) -> list[str]:
            return [word for word in words() if word.startswith(incomplete)]

        return complete


Options = Mapping[str, Option]
"""Options by name: what they are called in requests, in JSON lines and in records."""


class Request(dict[str, Any]):
    """Checked fields by name; what was not given is absent."""

    def but(self, **changes: Any) -> Request:
        """With other fields; None takes one out."""
        return Request({name: value for name, value in {**self, **changes}.items() if value is not None})


class Command:
    """A function of a Request that Typer calls with what was typed."""

    def __init__(self, run: Callable[[Request], None], options: Options) -> None:
        self.options, self.run = options, run
        self.spelled = {text: (name, option) for name, option in options.items() for text in option.spellings}
        self.__name__, self.__doc__, self.__module__ = run.__name__, run.__doc__, run.__module__
        lines = any(option.is_argument and option.line for option in options.values())
        parameters = [option.parameter(name, lines) for name, option in options.items()]
        self.__signature__ = inspect.Signature(parameters)
        self.__annotations__ = {p.name: p.annotation for p in parameters}

    def __call__(self, **values: Any) -> None:
        """Check what was typed and run. Raises EditError for the first value that is not allowed."""
        request, preset = self.request(values)
        if preset and "quiet" not in request:
            from edit_cli.console import print_note

            print_note(f"from edit.toml: {', '.join(f'{key} {_shown(preset[key])}' for key in preset)}")
        self.run(request)

    def request(self, values: Mapping[str, Any]) -> tuple[Request, dict[str, Any]]:
        """What was given, checked, and what of it came from presets. Raises EditError."""
        given = {name: value for name, value in values.items() if not _absent(value)}
        labels = {name: self.options[name].label for name in given}
        typed = {name for name, value in given.items() if value != self.options[name].default}
        request, held = Request(), {}
        for name, value in given.items():
            check = self.options[name].check
            if check is not None and self.options[name].many:
                request[name] = list(map(check, [labels[name]] * len(value), value))
            else:
                request[name] = True if check is None else check(labels[name], value)
        if "preset" in self.options:
            from edit_cli.commands.presets import settings  # reads TOML, which `edit --help` does without

            held = settings(self.options, request.pop("preset", None), typed)
            request.update(held)
        return request, held


def _absent(value: Any) -> bool:
    return value is None or value is False or value in ([], ())


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def command(*groups: Options) -> Callable[[Callable[[Request], None]], Command]:
    """A command that takes these options, in this order, as one checked Request."""
    options = {name: option for group in groups for name, option in group.items()}
    return lambda run: Command(run, options)


def only(options: Options, *names: str) -> Options:
    """Some of a group's options."""
    return {name: options[name] for name in names}


def under(panel: str, options: Options) -> Options:
    """Options under a heading of help."""
    return {name: replace(option, panel=panel) for name, option in options.items()}


def in_lines(*groups: Options) -> Options:
    """Those options that may stand in a line of an input list, which are those that a record holds."""
    return {name: option for group in groups for name, option in group.items() if option.line}
