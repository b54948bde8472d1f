"""Components that are their own configuration, and the one written form they all share.

A component is a frozen, keyword-only dataclass registered under a name. Its written form is

    name                              every option at its default
    name:key=value,key=value          options; tuples are written a/b/c, nothing is written none
    name:key=other(k=v,k=v)           an option that is itself a component
    package.module:Class:key=value    a class from outside the package

`Schedule.parse("linear:timesteps=200")` builds one; `component.spec` writes it back with every option spelt out,
so that a config file stays true when a default changes. To add a component is to write one class.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from abc import ABC
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic

from ddpm.errors import ConfigError

C = TypeVar("C", bound="Component")


class Component(ABC):
    """Base of every registered component; a kind of component is a direct subclass with `kind=`."""

    kind: ClassVar[str]
    name: ClassVar[str]
    registered: ClassVar[dict[str, type["Component"]]]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            cls.registered = {}

    def __post_init__(self) -> None:
        """Check and convert every option by its annotation; raises ConfigError."""
        for option, annotation in _options(type(self)).items():
            value = _convert(self, option, annotation, getattr(self, option))
            object.__setattr__(self, option, value)

    @property
    def spec(self) -> str:
        """The written form, with every option; `parse(spec)` gives an equal component."""
        options = _written_options(self)
        return f"{_head(self)}:{options}" if options else _head(self)

    def __str__(self) -> str:
        return self.spec

    @classmethod
    def names(cls) -> list[str]:
        """Names registered for this kind, sorted."""
        return sorted(cls.registered)

    @classmethod
    def parse(cls, spec: "str | Self") -> Self:
        """Build a component of this kind from its written form (a built one is returned as it is).

        Raises ConfigError: unknown name or option (with the nearest one), a value of the wrong type or range.
        """
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, str) or not spec.strip():
            raise ConfigError(f"{cls.kind}: expected a spec such as {cls.names()[0]!r}, found {spec!r}.")
        head, options = _split_head(spec.strip())
        found = _outside(cls, head) if ":" in head else cls.registered.get(head)
        if found is None:
            raise ConfigError(
                f"{cls.kind} {head!r} is not known{nearest(head, cls.names())}; choose from {', '.join(cls.names())}."
            )
        known = _options(found)
        for option in options:
            if option not in known:
                given = ", ".join(known) or "none"
                raise ConfigError(
                    f"{cls.kind} {head!r} has no option {option!r}{nearest(option, known)}; its options: {given}."
                )
        if missing := [option for option in _required(found) if option not in options]:
            raise ConfigError(f"{cls.kind} {head!r} needs {missing[0]}=...; its options: {', '.join(known)}.")
        return typing.cast(Self, found(**options))


@dataclass_transform(frozen_default=True, kw_only_default=True)
def register(name: str) -> Callable[[type[C]], type[C]]:
    """Class decorator: make the class a frozen, keyword-only dataclass, known as `name` among its kind."""

    def decorate(cls: type[C]) -> type[C]:
        built = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if built.registered.setdefault(name, built) is not built:
            raise ConfigError(f"{cls.kind} {name!r} is registered twice.")
        built.name = name
        return built

    return decorate


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that a component's file is all that adding it takes."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def import_object(path: str, what: str) -> Any:
    """The object that 'package.module:Name' stands for; modules of the working folder are found too.

    Raises ConfigError, which calls it `what`, whatever the import raises.
    """
    module, _, name = path.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        problem = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ConfigError(f"{what} {path!r} cannot be imported: {problem.rstrip('.')}.") from error
    finally:
        sys.path.remove("")


def outside_code(spec: str) -> list[str]:
    """Every 'module:Class' that parsing the written form would import, those of nested options too; imports nothing."""
    return re.findall(r"(?:^|[=(,])\s*([\w.]+:[A-Za-z_]\w*)(?=\s*(?:$|[:(),]))", spec)


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest known word, or ''."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _split_head(spec: str) -> tuple[str, dict[str, str]]:
    """'name:k=v,k=other(a=b)' -> ('name', {'k': 'v', 'k': 'other(a=b)'}); the head of outside code keeps its colon."""
    match = re.fullmatch(r"([\w.]+:[A-Za-z_]\w*)(?::(.*))?", spec) or re.fullmatch(r"([\w.+-]+)(?::(.*))?", spec)
    if match is None:
        raise ConfigError(f"cannot read the spec {spec!r}; write name:key=value,key=value.")
    head, rest = match.groups()
    options: dict[str, str] = {}
    for item in _split_top(rest or ""):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read {item!r} in the spec {spec!r}; write name:key=value,key=value.")
        if key.strip() in options:
            raise ConfigError(f"option {key.strip()!r} stands twice in the spec {spec!r}.")
        options[key.strip()] = value.strip()
    return head, options


def _split_top(text: str) -> list[str]:
    """Split at the commas that stand outside parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0:
        raise ConfigError(f"unbalanced parentheses in {text!r}.")
    return [part for part in parts if part.strip()]


def _outside(kind: type[Component], head: str) -> type[Component]:
    name, _, rest = head.partition(":")
    if name in kind.registered:
        raise ConfigError(f"cannot read {rest!r} in the spec {head!r}; write name:key=value,key=value.")
    found = import_object(head, kind.kind)
    if not (isinstance(found, type) and issubclass(found, kind) and dataclasses.is_dataclass(found)):
        raise ConfigError(
            f"{head!r} is not a {kind.kind}: derive it from {kind.__module__}.{kind.__name__} and decorate it with ddpm.registry.register."
        )
    if "name" not in vars(found) or vars(found)["name"] not in kind.registered:
        raise ConfigError(f"{head!r} is not registered: decorate it with ddpm.registry.register.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{head!r} is not whole: a {kind.kind} also defines {missing}.")
    return found


def _options(cls: Any) -> dict[str, Any]:
    """Option name -> annotation, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _required(cls: Any) -> list[str]:
    """Options without a default."""
    nothing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is nothing and f.default_factory is nothing]


@cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(
        annotation, config=pydantic.ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    )


def _convert(component: Component, option: str, annotation: Any, value: Any) -> Any:
    kinds = [a for a in (annotation, *typing.get_args(annotation)) if isinstance(a, type) and issubclass(a, Component)]
    optional = type(None) in typing.get_args(annotation)
    if optional and (value is None or value == "none"):
        return None
    if kinds:
        if isinstance(value, str):
            inner = re.fullmatch(r"(.+?)\((.*)\)", value)
            value = f"{inner[1]}:{inner[2]}" if inner and inner[2] else inner[1] if inner else value
        return kinds[0].parse(value)
    if typing.get_origin(annotation) is tuple and isinstance(value, str):
        value = tuple(part for part in value.split("/") if part)
    try:
        return _adapter(annotation).validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(
            f"{component.kind} {component.name!r}: {option}={_write(value)} is wrong: {problem[0].lower()}{problem[1:]}."
        ) from None


def _head(component: Component) -> str:
    """The registered name; a class from outside the package is named by where it can be imported from."""
    cls = type(component)
    return component.name if cls.__module__.split(".")[0] == "ddpm" else f"{cls.__module__}:{cls.__qualname__}"


def _written_options(component: Component) -> str:
    return ",".join(f"{option}={_write(getattr(component, option))}" for option in _options(type(component)))


def _write(value: Any) -> str:
    if isinstance(value, Component):
        options = _written_options(value)
        return f"{_head(value)}({options})" if options else _head(value)
    if isinstance(value, tuple | list):
        return "/".join(_write(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
