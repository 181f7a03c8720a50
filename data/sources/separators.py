"""Whether the separator between the documents of .txt files is there at all, and if not, why."""

from collections.abc import Iterable

from common.errors import ConfigError
from common.progress import Log
from data.sources.stored import Part, damage_named, unpacked

BLOCK = 1 << 20  # bytes
ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}


def check_separators(parts: list[Part], log: Log) -> None:
    """Tells which .txt files do not hold the separator. Each is read up to its first one.

    Raises:
        ConfigError: the separator is in none of them, or a file has it with the line ends of another system.
    """
    split = [part for part in parts if part.kind == ".txt" and part.separator is not None]
    whole = [part for part in split if not _holds(part, part.separator or "")]
    if not whole:
        return
    first = whole[0]
    separator = first.separator or ""
    for part in whole:
        for variant, cause in _variants(separator):
            if _holds(part, variant):
                raise ConfigError(
                    f"{part.name}: data.source.separator {separator!r} is not in it, but {variant!r} is: {cause}"
                )
    if len(whole) == len(split):
        raise ConfigError(
            f"{first.name}: data.source.separator {separator!r} is not in it"
            + (f", nor in the other {len(whole) - 1} .txt files" if len(whole) > 1 else "")
            + "; set it to what stands between the documents, or leave it out if every file is one document"
        )
    log(
        f"{len(whole)} of {len(split)} .txt files do not hold data.source.separator {separator!r} and are one document "
        f"each, such as {first.name}"
    )


def _variants(separator: str) -> Iterable[tuple[str, str]]:
    """What else may stand in a file, and what that means."""
    meant = separator
    for written, character in ESCAPES.items():
        meant = meant.replace(written, character)
    if meant != separator:
        yield meant, r'a backslash is itself in plain and in single-quoted YAML; write it in double quotes, as "\n"'
    lines = meant.replace("\r\n", "\n").replace("\r", "\n")
    for end, system in (("\n", "Unix"), ("\r\n", "Windows"), ("\r", "old Mac")):
        variant = lines.replace("\n", end)
        if variant not in (separator, meant):
            yield variant, f"the file has {system} line ends; set data.source.separator to that, or convert the file"


def _holds(part: Part, text: str) -> bool:
    """Whether a text occurs in a file. UTF-8 can be searched as bytes."""
    wanted = text.encode()
    rest = b""
    with damage_named(part.name, lambda: "its start"), unpacked(part) as (stream, _):
        while block := stream.read(BLOCK):
            if wanted in rest + block:
                return True
            rest = (rest + block)[-len(wanted) + 1 :] if len(wanted) > 1 else b""
    return False
