"""Flags made from the config, and a parser whose every complaint is one sentence.

`Parser` is argparse without abbreviations and usage dumps: `_` and `-` are the same, unknown flags get the nearest
known one, switches need no value. `add_fields` makes a flag of each config field; what was typed, and nothing else, is
in `namespace.typed` afterwards, and `build` lays it over the presets and files.
"""

import argparse
import difflib
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from ddpm import config
from ddpm.errors import ConfigError
from ddpm.registry import nearest

_SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")
_SPECS = typing.get_args(config.Specs)[1]
_LETTERS = {int: "N", float: "X", Path: "PATH", str: "TEXT", float | str: "X|SPEC"}
_COMPLAINTS = (
    (r"^argument (?:-\w/)?(\S+): ", r"\1: "),
    (r"^(\S+): expected one argument$", r"\1 needs a value"),
    (r"^(\S+): not allowed with argument (\S+)$", r"\1 and \2 exclude each other"),
    (r"^the following arguments are required: (.*)$", r"\1 is missing; see --help"),
    (r"^unrecognized arguments: (.*)$", r"'\1' is not expected here; see --help"),
)
"""What argparse says, and how it is said here."""


@dataclass
class Typed:
    """Config fields that were typed: dotted name -> value, and -> the flag as it was spelt."""

    values: dict[str, Any] = field(default_factory=dict)
    spelling: dict[str, str] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """The flags of one verb. `parse` raises ConfigError for anything wrong and SystemExit(0) after --help."""

    def __init__(self, verb: str, usage: str, about: str, examples: Iterable[tuple[str, str]], more: str = "") -> None:
        lines = [line for command, why in examples for line in (f"  # {why}", f"  {command}")]
        super().__init__(
            prog=f"ddpm {verb}", usage=f"ddpm {verb} {usage}", description="\n".join([_wrap(about), "", "examples:", *lines, *([more] if more else [])]),
            formatter_class=_Formatter, allow_abbrev=False, add_help=False,
        )  # fmt: skip
        self.switches: set[str] = set()
        self.set_defaults(typed=Typed())
        self._positionals.title = "arguments"
        self.own = self.add_argument_group("flags")
        self.own.add_argument("-h", "--help", action="help", help="show this and leave")
        self.own.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Flags and positional words may come in any order."""
        return self.parse_intermixed_args(list(self._tidied(list(argv))))

    def error(self, message: str) -> NoReturn:
        """One sentence instead of a usage dump."""
        for pattern, words in _COMPLAINTS:
            message = re.sub(pattern, words, message, flags=re.DOTALL)
        raise ConfigError(message.rstrip(".") + ".")

    def _tidied(self, words: list[str]) -> Iterable[str]:
        """The words with every flag spelt as registered and every switch given its value."""
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                yield word
                continue
            name, equals, value = word.partition("=")
            flag, negated = self._known(name)
            if flag not in self.switches:
                yield flag + equals + value
            elif negated and equals:
                raise ConfigError(f"{name} takes no value.")
            elif equals:
                yield f"{flag}={value}"
            else:
                follows = not negated and bool(words) and words[0].lower() in _SWITCH_WORDS
                yield f"{flag}={words.pop(0) if follows else str(not negated).lower()}"

    def _known(self, name: str) -> tuple[str, bool]:
        spelt = {flag.replace("_", "-"): flag for flag in self._option_string_actions if flag.startswith("--")}
        plain = name.replace("_", "-")
        if plain in spelt:
            return spelt[plain], False
        if spelt.get("--" + plain.removeprefix("--no-")) in self.switches:
            return spelt["--" + plain.removeprefix("--no-")], True
        raise ConfigError(f"{name!r} is not a flag{_nearest_flag(plain, spelt)}; see --help.")


def _nearest_flag(name: str, known: Iterable[str]) -> str:
    """A flag without its group, or with another's, is taken for the field of that name."""
    leaf = re.split(r"[.]|--", name)[-1]
    same = [flag for flag in known if re.split(r"[.]|--", flag)[-1] == leaf]
    return f" (did you mean {difflib.get_close_matches(name, same, 1, 0)[0]!r}?)" if same else nearest(name, known)


def add_fields(parser: Parser, groups: Sequence[str] | None = None) -> None:
    """A flag for every config field of the named groups (default: all of them), under the group's heading."""
    short = {dotted: flag for flag, dotted in config.SHORT_FLAGS.items()}
    for name, info in config.RunConfig.model_fields.items():
        if (
            isinstance(info.annotation, type)
            and issubclass(info.annotation, BaseModel)
            and (groups is None or name in groups)
        ):
            heading = parser.add_argument_group(name, _wrap(info.annotation.__doc__ or ""))
            for leaf, leaf_info in info.annotation.model_fields.items():
                dotted = f"{name}.{leaf}"
                spellings = [
                    *([short[dotted]] if dotted in short and groups is None else []),
                    f"--{dotted.replace('_', '-')}",
                ]
                _add_field(parser, heading, dotted, leaf_info, spellings, _default(leaf_info))


def add_field(parser: Parser, dotted: str, flag: str, default: str | None = None) -> None:
    """One config field under a flag of the verb's own; `default` is what --help says of it."""
    info = config.fields()[dotted]
    _add_field(parser, parser.own, dotted, info, [flag], default if default is not None else _default(info))


def _add_field(parser: Parser, group: Any, dotted: str, info: FieldInfo, spellings: list[str], default: str) -> None:
    several = _SPECS in info.metadata

    class Store(argparse.Action):
        def __call__(self, _: Any, namespace: argparse.Namespace, words: Any, option_string: str | None = None) -> None:
            words = "--" if words == [] else words  # what argparse makes of --flag=--
            before = namespace.typed.values.get(dotted) if several else None
            namespace.typed.values[dotted] = _value(info, f"{before} {words}" if before else words)
            namespace.typed.spelling[dotted] = option_string or spellings[-1]

    if info.annotation is bool:
        parser.switches.update(spellings)
    text = f"{info.description}{f' (default: {default})' if default and 'default:' not in (info.description or '') else ''}"
    group.add_argument(
        *spellings,
        dest=argparse.SUPPRESS,
        action=Store,
        default=argparse.SUPPRESS,
        metavar=_metavar(info),
        help=(f"{text}; give the flag once for each" if several else text).replace("%", "%%"),
    )


def _value(info: FieldInfo, text: str) -> Any:
    """What a field gets: text, except where pydantic takes none ('none', choices that are numbers, plain tuples)."""
    choices = {str(choice): choice for choice in _choices(info)}
    if text in choices:
        return choices[text]
    if text == "none" and type(None) in typing.get_args(info.annotation):
        return None
    if typing.get_origin(info.annotation) is tuple and not any(
        isinstance(part, BeforeValidator) for part in info.metadata
    ):
        return tuple(part.strip() for part in text.split(","))
    return text


def _inner(info: FieldInfo) -> Any:
    """The annotation without `| None`, with the validators that pydantic took off it."""
    options = [option for option in typing.get_args(info.annotation) if option is not type(None)]
    optional = type(None) in typing.get_args(info.annotation)
    return options[0] if optional else info.annotation


def _choices(info: FieldInfo) -> tuple[Any, ...]:
    inner = _inner(info)
    return typing.get_args(inner) if typing.get_origin(inner) is Literal else ()


def _metavar(info: FieldInfo) -> str:
    inner = _inner(info)
    if choices := _choices(info):
        return "|".join(map(str, choices))
    if inner is bool:
        return "true|false"
    if inner == config.Size:
        return "HxW"
    if _SPECS in info.metadata:
        return "SPEC"
    plain = _bare(inner)
    if typing.get_origin(plain) is tuple:
        letter = _LETTERS.get(_bare(typing.get_args(plain)[0]), "")
        return f"{letter},{letter},..."
    return _LETTERS.get(plain, "TEXT")


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _default(info: FieldInfo) -> str:
    value = info.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def build(layers: Sequence[tuple[str, Mapping[str, Any]]], typed: Typed) -> config.RunConfig:
    """Lay (source, values) over the defaults, one after the other, then what was typed; raises ConfigError naming the source or the flag."""
    values: dict[str, Any] = {}
    for source, layer in layers:
        values = config.merge(values, layer)
        config.build(values, source)
    try:
        return config.build(config.merge(values, config.nest(typed.values)), "")
    except ConfigError as error:
        raise ConfigError(_as_flag(str(error).removeprefix(": "), typed.spelling)) from None


def _as_flag(problem: str, spelling: Mapping[str, str]) -> str:
    """'train.lr=...' -> '--lr=...', as it was typed."""
    for dotted, flag in spelling.items():
        if re.match(rf"{re.escape(dotted)}[.= ]", problem):
            return flag + re.sub(r"^[.][\w.\-\[\],() ]*?(?==)", "", problem[len(dotted) :])
    return problem


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: an integer in least..most."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,20}", text, re.ASCII) or not least <= int(text) <= most:
            bounds = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is wrong: write a whole number {bounds}")
        return int(text)

    return convert


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """The words without some flags that take one value each."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in flags:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size().columns))


def _wrap(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _width(), break_on_hyphens=False)


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, for --help."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    indent = " " * (width + 4)
    lines = [
        textwrap.fill(f"  {name:{width}}  {text}", _width(), subsequent_indent=indent, break_on_hyphens=False)
        for name, text in rows
    ]
    return "\n".join(["", f"{title}:", *lines])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """'--lr, --train.lr X' instead of the value after each spelling."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar or action.dest.upper()}"


def in_a_group(flag: str) -> bool:
    """Whether the launcher made this process; raises ConfigError where torchrun did, which does its own starting."""
    from ddpm import distributed

    size = distributed.described().size
    if size > 1 and not distributed.launched():
        raise ConfigError(f"{flag} cannot be had in a group that is there already (WORLD_SIZE={size}); leave it out.")
    return distributed.launched()
