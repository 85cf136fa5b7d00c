"""How a table of options becomes commands, and what was typed a checked Request. Torch-free."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import typer

from edit_cli.errors import EditError

Check = Callable[[str, Any], Any]
"""(place for the message, text or JSON value) -> the value. Raises EditError."""


@dataclass(frozen=True)
class Option:
    """One option of `edit`: how it is typed, what help says, how its text becomes a value.

    names: its spellings, the first is used in messages; without dashes it is a positional argument.
    panel: heading in help. check: None for a switch. many: may be given several times; where the metavar
    ends with "...", several values may follow the name. line: whether it may stand in a JSON line of an input
    list, as a value or a list. default: typed where nothing is; shown: the default as help tells it.
    instead: of an argument that has to be given, the options that may take its place.
    """

    names: str
    metavar: str = ""
    help: str = ""
    panel: str | None = None
    check: Check | None = None
    many: bool = False
    line: Literal["", "value", "list"] = ""
    default: str | None = None
    shown: str | bool = True
    instead: tuple[str, ...] | None = None

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
        """The checked value of something typed, recorded or read. Raises EditError."""
        if self.check is None:
            return bool(given)
        if self.many and isinstance(given, (list, tuple)):
            return [self.check(where, each) for each in given]
        return self.check(where, given)

    def parameter(self, name: str, lines: bool) -> inspect.Parameter:
        """What Typer reads it from. lines: whether the command takes JSON lines."""
        kind: Any = bool if self.check is None else list[str] | None if self.many else str | None
        if self.is_argument:
            info: Any = typer.Argument(metavar=self.metavar, help=self.help)
        else:
            star = " *" if self.line and lines else ""
            info = typer.Option(
                *self.spellings, metavar=self.metavar, help=self.help + star, rich_help_panel=self.panel,
                show_default=self.shown if self.default or self.shown is not True else False,
            )  # fmt: skip
        required = self.is_argument and not self.many
        default = inspect.Parameter.empty if required else False if self.check is None else self.default
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )


Options = Mapping[str, Option]
"""Options by name: what they are called in requests, in JSON lines and in records."""


class Request(dict[str, Any]):
    """Checked fields by name; what was not given is absent."""

    @classmethod
    def typed(cls, options: Options, values: Mapping[str, Any]) -> Request:
        """What was typed. Raises EditError for the first value that is not allowed."""
        given = {name: value for name, value in values.items() if value not in (None, False, [], ())}
        return cls({name: options[name].value(options[name].label, v) for name, v in given.items()})

    def but(self, **changes: Any) -> Request:
        """With other fields; None takes one out."""
        return Request({name: value for name, value in {**self, **changes}.items() if value is not None})


class Command:
    """A function of a Request that Typer calls with what was typed."""

    def __init__(self, run: Callable[[Request], None], options: Options) -> None:
        self.options, self.run = options, run
        self.__name__, self.__doc__, self.__module__ = run.__name__, run.__doc__, run.__module__
        lines = any(option.is_argument and option.line for option in options.values())
        parameters = [option.parameter(name, lines) for name, option in options.items()]
        self.__signature__ = inspect.Signature(parameters)
        self.__annotations__ = {p.name: p.annotation for p in parameters}

    def __call__(self, **values: Any) -> None:
        """Check what was typed and run."""
        self.run(Request.typed(self.options, values))


def command(*groups: Options) -> Callable[[Callable[[Request], None]], Command]:
    """A command that takes these options, in this order, as one checked Request."""
    options = {name: option for group in groups for name, option in group.items()}
    return lambda run: Command(run, options)


def only(options: Options, *names: str) -> Options:
    """Some of a group's options."""
    return {name: options[name] for name in names}


def under(panel: str, options: Options) -> Options:
    """Options under another heading of help."""
    return {name: replace(option, panel=panel) for name, option in options.items()}


def in_lines(*groups: Options) -> Options:
    """Those options that may stand in a line of an input list, which are those that a record holds."""
    return {name: option for group in groups for name, option in group.items() if option.line}


def spread(words: Sequence[str], options: Options) -> list[str]:
    """`--seed 1 2 3` -> `--seed 1 --seed 2 --seed 3`: option parsers take one value for each name.

    A further word belongs to the option if it could be a value of it, unless the command's argument would
    then be missing: `--seed 1 2001` alone draws "2001".
    """
    named = {typed: (name, option) for name, option in options.items() for typed in option.spellings}
    result: list[str] = []
    further: list[tuple[int, str]] = []  # places in the result of values that follow another, and whose
    given: set[str] = set()
    current, rest = "", iter(words)
    for word in rest:
        typed, inline, _ = word.partition("=")
        if word == "--":
            result += [word, *rest]
            given.add("argument")
        elif typed in named:
            name, option = named[typed]
            given.add(name)
            result += [word] if inline or option.check is None else [word, *_one(rest)]
            current = typed if option.many and option.metavar.endswith("...") else ""
        elif current and not word.startswith("-") and _accepts(named[current][1], word):
            further.append((len(result), current))
            result.append(word)
        else:
            current = ""
            result.append(word)
            given |= set() if word.startswith("-") else {"argument"}
    for option in options.values():
        if option.instead is not None and not given & {"argument", *option.instead}:
            return result
    for place, typed in reversed(further):
        result.insert(place, typed)
    return result


def _one(words: Iterator[str]) -> list[str]:
    return [word for _, word in zip(range(1), words, strict=False)]


def _accepts(option: Option, word: str) -> bool:
    try:
        option.value(option.label, word)
    except EditError:
        return False
    return True
