"""Settings: a YAML file with `key=value` overrides, read strictly into pydantic models.

Every model of settings in the house is `class X(BaseModel, extra="forbid", frozen=True)` and is made by `validate`,
so that a wrong setting stops the program with a path, what was given, what was expected and a remedy.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from common.errors import ConfigError
from common.yaml_tree import DEEPEST, SURROGATE, check_key, parse, quoted, read_text

Model = TypeVar("Model", bound=BaseModel)
MOST_PROBLEMS = 20  # that are told at once


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Reads a YAML file and applies `key=value` overrides.

    Args:
        path: the file; its top level must be a mapping.
        overrides: `dotted.path=value`, the value in YAML; later ones win. Missing mappings on the way are made.
    Returns:
        The tree of plain values, not yet validated.
    Raises:
        ConfigError: the file is missing, unreadable, malformed or no mapping, or an override is malformed.
    """
    shown = quoted(str(path))
    tree = parse(read_text(path), shown)
    if not isinstance(tree, dict):
        raise ConfigError(f"{shown}: the top level must be a mapping of keys to values, but it is {_show(tree)}")
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: dict, override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys, origin = dotted.split("."), f"override {_cut(repr(override))}"
    if not equals or not all(keys) or dotted != dotted.strip():
        raise ConfigError(f"{origin}: expected key=value with a dotted path, such as data.val_fraction=0.01")
    if len(keys) > DEEPEST:
        raise ConfigError(f"{origin}: a path of {len(keys)} keys; expected {DEEPEST} at most")
    node = tree
    for depth, key in enumerate(keys, start=1):
        try:
            check_key(key)
        except ValueError as error:
            raise ConfigError(f"{origin}: {error}") from None
        if depth == len(keys):
            break
        below = node.get(key)
        if below is None:
            below = node[key] = {}
        if not isinstance(below, dict):
            above = ".".join(keys[:depth])
            raise ConfigError(f"{origin}: {above} is {_show(below)}, not a mapping, so it has no keys to set")
        node = below
    node[keys[-1]] = parse(value, origin)


def validate(cls: type[Model], tree: Any, where: str = "") -> Model:
    """Makes a `cls` of plain values read from YAML.

    Strict: `"3"` is no integer and `1` no boolean; but an integer is a float, a string a Path, a list a tuple.

    Args:
        cls: the pydantic model.
        tree: mappings, lists and scalars.
        where: dotted path of `tree` in the file, for messages.
    Raises:
        ConfigError: one line for each problem, with its dotted path.
    """
    try:
        plain = json.dumps(tree, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where or 'the top level'}: expected plain keys and values, without cycles: {error}"
        ) from None
    for path, leaf in _leaves(tree, where):
        if isinstance(leaf, str) and SURROGATE.search(leaf):
            raise ConfigError(f"{quoted(path)}: given {_cut(ascii(leaf))}; expected text without halves of characters")
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(
                f"{path}: given {leaf}; expected a finite number (a setting that may be empty, null, has no bound "
                "so; put it in quotes if it is text)"
            )
    try:
        # Strict JSON is what YAML needs: exact scalars, but strings for paths and lists for tuples.
        return cls.model_validate_json(plain, strict=True)
    except ValidationError as error:
        problems: dict[str, list[tuple[Any, list[str]]]] = {}
        for problem in error.errors(include_url=False):
            path, choices = _locate(cls, problem, where)
            problems.setdefault(path, []).append((problem, choices))
        lines = [_explain(path, said) for path, said in islice(problems.items(), MOST_PROBLEMS)]
        more = len(problems) - len(lines)
        raise ConfigError("\n".join([*lines, *[f"and {more} more problems"] * (more > 0)])) from None


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Keys and scalars of plain values, with their dotted paths."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            below = f"{path}.{key}" if path else str(key)
            yield below, key
            yield from _leaves(value, below)
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{place}")
    else:
        yield path, tree


def _explain(path: str, said: list[tuple[Any, list[str]]]) -> str:
    """One line for everything pydantic says about one path (for a union it complains once for each member)."""
    # in a union, what a member's own check says tells more than that other members are of another type
    problem, choices = next((entry for entry in said if entry[0]["type"] == "value_error"), said[0])
    kind, message, given = problem["type"], problem["msg"], _show(problem["input"])
    name = path or "the top level"
    if kind == "extra_forbidden":
        parent, _, key = path.rpartition(".")
        near = difflib.get_close_matches(key, choices, n=1)
        if near:
            return f"{path}: unknown key; did you mean {parent + '.' if parent else ''}{near[0]}?"
        return f"{path}: unknown key; the keys of {parent or 'the top level'} are {', '.join(choices)}"
    if kind == "missing":
        return f"{path}: missing; this key must be given"
    if kind == "union_tag_not_found":
        return f"{name}.{_discriminator(problem)}: missing; expected one of {', '.join(choices)}"
    if kind == "union_tag_invalid":
        given = _show(problem["ctx"]["tag"])
        return f"{name}.{_discriminator(problem)}: given {given}; expected one of {', '.join(choices)}"
    if kind == "value_error":
        told = _cut(str(problem["ctx"]["error"]), 1000)
        return f"{path}: {told}" if path else told
    prefix = "Input should be "
    wanted = dict.fromkeys(p["msg"].removeprefix(prefix) for p, _ in said if p["msg"].startswith(prefix))
    if not wanted:
        return f"{name}: given {given}; {message}"
    expected = " or ".join(wanted).replace("a valid array", "a list").replace("an object", "a mapping")
    return f"{name}: given {given}; expected {expected}"


def _discriminator(problem: Any) -> str:
    return problem["ctx"]["discriminator"].strip("'")


def _locate(cls: type[BaseModel], problem: Any, where: str) -> tuple[str, list[str]]:
    """Dotted path of a pydantic error, and what could stand there: keys for a key, tags for a discriminator.

    Pydantic writes the chosen member of a union into the location; the types tell such a label from a key.
    """
    names = [where] if where else []
    here: Any = cls
    keys: list[str] = []
    for part in problem["loc"]:
        members = members_of(here)
        if len(members) > 1:
            label = str(part).rpartition(" ")[2].rstrip("]")  # of function-after[check(), Model], a Model with checks
            here = next((m for m in members if label in _labels(m)), None)
            continue
        node = members[0] if members else None
        if part == "[key]":
            continue
        names.append(str(part))
        keys = []
        if isinstance(node, type) and issubclass(node, BaseModel):
            keys = [field.alias or name for name, field in node.model_fields.items()]
            fields = [field for name, field in node.model_fields.items() if part in (name, field.alias)]
            here = fields[0].annotation if fields else None
        else:
            arguments = [a for a in get_args(node) if a is not Ellipsis]
            fixed = get_origin(node) is tuple and isinstance(part, int) and part < len(arguments)
            here = arguments[part if fixed and isinstance(part, int) else -1] if arguments else None
    if problem["type"].startswith("union_tag"):
        tags = [member.model_fields[_discriminator(problem)].annotation for member in members_of(here)]
        keys = [str(value) for tag in tags for value in get_args(tag)]
    return ".".join(names), keys


def members_of(annotation: Any) -> list[Any]:
    """The types that a value may have: unions opened, Annotated taken off, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members_of(part)]
    return [] if annotation is type(None) or annotation is None else [annotation]


def _labels(member: Any) -> set[str]:
    """What pydantic may call a member of a union in a location: its name, or a value of its discriminator."""
    labels = {getattr(member, "__name__", ""), str(member)}
    if isinstance(member, type) and issubclass(member, BaseModel):
        for field in member.model_fields.values():
            if get_origin(field.annotation) is Literal:
                labels.update(get_args(field.annotation))
    return labels


def _show(value: Any) -> str:
    """A value as one would write it in YAML, cut to a readable length."""
    if isinstance(value, Mapping) and not value:
        return "an empty mapping"
    if value is None:
        return "empty (null)"
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # it holds itself
        text = str(value)
    return _cut("".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[:80]) + text[80:])


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}{key}"
        found.update(flat(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return found
