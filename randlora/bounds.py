"""What a setting may be, declared once: in the annotation of its field. Checks, help and pages are read from it.

A field such as ``rank: Count = 6`` or ``schedule: Literal["cosine", "linear"] = "cosine"`` says its type and its range.
Nothing is converted: a value that is refused is refused, and one that is allowed stays as it was given.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge, Gt, Le, Len, Lt, Predicate

from randlora.errors import SettingsError

if typing.TYPE_CHECKING:
    from pydantic import TypeAdapter


def _fits_a_path(name: str) -> bool:
    return name not in (".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|') and 0 < len(name) < 129


def _has_one_place(template: str) -> bool:
    try:
        places = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a brace alone
        return False
    return places == [("", "", None)]


Count = Annotated[int, Ge(1), Lt(2**31)]
CountOrZero = Annotated[int, Ge(0), Lt(2**31)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Part = Annotated[float, Gt(0), Lt(1)]
FolderName = Annotated[
    str, Predicate(_fits_a_path), DocInfo("a name that a folder can have: without / and no longer than 128")
]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Fraction = Annotated[float, Gt(0), Le(1)]
Folder = Annotated[str, Len(1), DocInfo("a folder")]
ImageSize = Annotated[int, Ge(1), Le(8192)]
Colours = Annotated[Sequence[NotNegative], Len(3, 3)]
Template = Annotated[str, Predicate(_has_one_place), DocInfo("a text with one {}, where the class name goes")]


class Bounded:
    """The base of dataclasses of settings: what a field's annotation does not allow is a SettingsError.

    A subclass with relations between its fields checks them in its own `__post_init__`, after ``super()``'s. Plain
    annotations are types without a range. Annotations must be known at run time, not to a type checker alone.
    """

    section: ClassVar[str | None] = None  # what stands before a field's name in messages; None: the name of the class

    def __post_init__(self) -> None:
        fields = declared(type(self))
        section = type(self).__name__ if self.section is None else self.section
        check(section, fields, {name: getattr(self, name) for name in fields})


def count(text: str) -> int:
    """A Count of the command line, for argparse's `type`; SettingsError, a ValueError, for any other text."""
    number = int(text)
    check("", {"count": Count}, {"count": number})
    return number


def declared(cls: type[Any]) -> Mapping[str, Any]:
    """The annotations of a dataclass's settings, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def check(section: str, annotations: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises SettingsError for the first of the `values` that its annotation does not allow.

    Numbers are finite, true and false are no numbers, and a text is neither.

    Args:
        section: what stands before the names in the message.
        annotations: what is allowed, by name.
        values: by name; those without an annotation are not looked at.
    """
    from pydantic import ValidationError

    for name, annotation in annotations.items():
        if name not in values:
            continue
        try:
            _adapter(annotation).validate_python(values[name])
        except ValidationError as error:
            value, place = values[name], error.errors()[0]["loc"]
            if len(place) == 1 and isinstance(place[0], int) and typing.get_origin(annotation) is Sequence:
                name, value, annotation = f"{name}[{place[0]}]", value[place[0]], typing.get_args(annotation)[0]
            shown = repr(value)
            shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
            remedy = "choose one of " if typing.get_origin(annotation) is Literal else "must be "
            raise SettingsError(f"{section}.{name}={shown}: {remedy}{allowed(annotation)}".lstrip(".")) from error


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Pydantic's check of an annotation."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def allowed(annotation: Any) -> str:
    """What an annotation allows, in words: `a whole number of at least 1, or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _in_range(arguments[0], arguments[1:])
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(dict.fromkeys(map(allowed, arguments)))
    if origin is Literal:
        words = [str(value).lower() if isinstance(value, bool) else str(value) for value in arguments]
        return ", ".join(words)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"a mapping of {allowed(arguments[0])} to {allowed(arguments[1])}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list whose items are each {allowed(arguments[0])}"
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _in_range(kind: Any, limits: Sequence[object]) -> str:
    """The words of ``Annotated[kind, *limits]``."""
    words = []
    for limit in limits:
        match limit:
            case DocInfo(documentation=words_of_its_own):
                return words_of_its_own
            case Ge(ge=bound):
                words.append(f"of at least {bound}")
            case Gt(gt=bound):
                words.append(f"above {bound}")
            case Lt(lt=bound):
                words.append(f"below {bound:,}")
            case Le(le=bound):
                words.append(f"at most {bound:,}")
            case Len(min_length=least, max_length=most):
                words.append(f"({least} of them)" if least == most else f"({least} or more)")
    return f"{allowed(kind)} {' and '.join(words)}".strip()
