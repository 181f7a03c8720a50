"""Settings: a YAML file with `key=value` overrides, read strictly into pydantic models.

Every model of settings in the house is `class X(BaseModel, extra="forbid", frozen=True)` and is made by `validate`,
so that a wrong setting stops the program with a path, what was given, what was expected and a remedy.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from common.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without two of its traps: `3e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 asks for a dot and a signed exponent in a float, so it reads 3e-4 and 1e3 as strings.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ConfigError(f"{origin}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: it is nested too deeply") from None
    except (ValueError, AttributeError) as error:  # of a number or a date
        raise ConfigError(f"{origin}: a value cannot be read ({error}); put it in quotes if it is text") from None


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file; give the path of a YAML file, such as one of configs/"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a YAML file, such as one of configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values, but it is {_show(tree)}")
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: dict, override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys) or dotted != dotted.strip():
        raise ConfigError(
            f"override {override!r}: expected key=value with a dotted path, such as data.val_fraction=0.01"
        )
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        below = node.get(key)
        if below is None:
            below = node[key] = {}
        if not isinstance(below, dict):
            above = ".".join(keys[:depth])
            raise ConfigError(
                f"override {override!r}: {above} is {_show(below)}, not a mapping, so it has no keys to set"
            )
        node = below
    node[keys[-1]] = _parse(value, f"override {override!r}")


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
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where or 'the top level'}: expected plain keys and values, without cycles: {error}"
        ) from None
    try:
        # Strict JSON is what YAML needs: exact scalars, but strings for paths and lists for tuples.
        return cls.model_validate_json(plain, strict=True)
    except ValidationError as error:
        problems: dict[str, list[tuple[Any, list[str]]]] = {}
        for problem in error.errors(include_url=False):
            path, choices = _locate(cls, problem, where)
            problems.setdefault(path, []).append((problem, choices))
        raise ConfigError("\n".join(_explain(path, said) for path, said in problems.items())) from None


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
        return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
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
            here = next((m for m in members if part in _labels(m)), None)
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
    return text if len(text) <= 80 else text[:77] + "..."


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{above}{key}"
        found.update(flat(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return found
