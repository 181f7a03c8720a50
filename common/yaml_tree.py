"""YAML as plain values, and back: text, numbers, booleans, null, lists, and mappings whose keys are text.

A file of settings may come from anybody, so what reading costs is bounded, aliases counted with all that they stand
for; and what YAML 1.1 makes of a word is taken only where nobody is surprised: dates, 010, 1:30 and 0b1 are text.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError
from common.files import read_bounded

MOST_BYTES = 256 * 2**10  # of a file
MOST_VALUES = 10_000  # of a file or an override, keys included
DEEPEST = 20  # mappings and lists in one another
LONGEST_KEY = 200  # characters

WORDS: dict[str, bool | None] = {"": None, "~": None}
for _names, _value in {"null": None, "true yes on": True, "false no off": False}.items():
    for _name in _names.split():
        WORDS |= dict.fromkeys((_name, _name.capitalize(), _name.upper()), _value)
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
FRACTION = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
SURROGATE = re.compile("[\ud800-\udfff]")
TEMPLATE = 'text with braces, such as a template, needs quotes: "{{ name }}"'


def read_text(path: str | Path) -> str:
    """The text of a file of settings. Raises ConfigError: it is missing, no regular file, too large or not UTF-8."""
    shown, example = quoted(str(path)), "give the path of a YAML file, such as one of configs/"
    try:
        if Path(path).is_dir():
            raise ConfigError(f"{shown}: is a folder; {example}")
        content = read_bounded(Path(path), MOST_BYTES)  # a pipe would be waited for, and the ranks read it again
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such file; {example}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror or error}); {example}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: cannot be read as a UTF-8 text file: {error}; save it as UTF-8") from None


def parse(text: str, origin: str) -> Any:
    """Plain values of YAML. Raises ConfigError, which begins with `origin` and the line, for what is not plain."""
    try:
        if SURROGATE.search(text):  # bytes of a command line that are not UTF-8
            raise yaml.YAMLError("it holds a character that UTF-8 has not")
        return _Builder(text).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{origin}{line}: not valid YAML: {problem}") from None


def to_yaml(tree: Any) -> str:
    """YAML of plain values; `parse` gives the same values back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def quoted(text: str) -> str:
    """Text as it is, or with escapes in quotes if a terminal would not show all of it as it is."""
    return text if text.isprintable() and text else repr(text)


def check_key(key: str) -> None:
    """Raises ValueError unless a key can be one of a setting."""
    if not key or len(key) > LONGEST_KEY:
        raise ValueError(f"a key of {len(key)} characters; expected 1 to {LONGEST_KEY}")
    if CONTROL.search(key) or SURROGATE.search(key):
        raise ValueError(f"the key {key!r} holds control characters or halves of characters; leave them out")


def plain(text: str) -> Any:
    """What an unquoted word means. Raises ValueError for a whole number that no setting could hold."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        digits = text.replace("_", "")
        if len(digits) > 21 or not -(2**63) <= int(digits) < 2**64:
            raise ValueError(
                f"a whole number of {len(digits.lstrip('+-'))} digits, more than 64 bits hold; put it in quotes if it "
                "is text"
            )
        return int(digits)
    if FRACTION.fullmatch(text) and not text.lstrip("+-").replace("_", "").isdecimal():
        return float(text.replace("_", ""))
    if found := NOT_FINITE.fullmatch(text):
        return float(found[1] + found[2].lower())
    return text


class _Builder:
    """Makes plain values of a parser's events, and counts them."""

    def __init__(self, text: str) -> None:
        self._parser: Any = yaml.SafeLoader(text)
        self._anchors: dict[str, tuple[Any, int] | None] = {}  # with how many values; None: not whole yet
        self._values = 0

    def document(self) -> Any:
        """The one document of the text; None if it is empty."""
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), 0)
        self._next()
        if not isinstance(after := self._next(), yaml.StreamEndEvent):
            raise _wrong("a second document begins here; give one, without `---` in between", after)
        return value

    def _next(self) -> Any:
        return self._parser.get_event()

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise _wrong(f"more than {MOST_VALUES:,} values, with those that aliases repeat", event)

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            found = self._anchors.get(str(event.anchor))
            if found is None:
                why = "stands within what it names" if event.anchor in self._anchors else "names nothing before it"
                raise _wrong(f"the alias *{event.anchor} {why}", event)
            self._count(found[1], event)
            return copy.deepcopy(found[0])  # an override changes one of them
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _wrong(f"the tag {quoted(tag)} is not taken; leave it out (quotes make text)", event)
        if depth > DEEPEST:
            raise _wrong(f"it is nested too deeply: more than {DEEPEST} levels", event)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        before = self._values
        self._count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := self._next(), yaml.SequenceEndEvent):
                value.append(self._value(item, depth + 1))
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._values - before)
        return value

    def _scalar(self, event: Any) -> Any:
        if SURROGATE.search(event.value):
            raise _wrong("an escape stands for half a character; write the character itself", event)
        try:
            return plain(event.value) if event.implicit[0] else event.value
        except ValueError as error:
            raise _wrong(str(error), event) from None

    def _mapping(self, depth: int) -> dict[str, Any]:
        given: dict[str, Any] = {}
        merged: dict[str, Any] | None = None
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                if merged is not None:
                    raise _wrong("the key '<<' is given twice", event)
                merged = self._merged(event, self._value(self._next(), depth + 1))
                continue
            key = self._key(event)
            if key in given:
                raise _wrong(f"the key {key!r} is given twice", event)
            given[key] = self._value(self._next(), depth + 1)
        return {**(merged or {}), **given}

    def _key(self, event: Any) -> str:
        """As it is written: a key is text, whatever it looks like."""
        self._count(1, event)
        if not isinstance(event, yaml.ScalarEvent):
            raise _wrong(f"a mapping, a list or an alias cannot be a key ({TEMPLATE})", event)
        if event.tag is not None or event.anchor is not None:
            raise _wrong("a key takes no tag and no anchor", event)
        try:
            check_key(event.value)
        except ValueError as error:
            raise _wrong(str(error), event) from None
        return str(event.value)

    def _merged(self, event: Any, value: Any) -> dict[str, Any]:
        """What `<<` brings in: a mapping, or several, of which the first has a key's value."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise _wrong("<< takes a mapping or a list of mappings", event)
        return {key: inner for mapping in reversed(mappings) for key, inner in mapping.items()}


def _wrong(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `plain` would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A node of text."""
        try:
            misread = not isinstance(plain(text), str)
        except ValueError:
            misread = True
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if misread else None)


_Dumper.add_representer(str, _Dumper.represent_text)
