"""Which text is UTF-8: byte-order marks, and the encodings that its first bytes tell."""

import codecs

from common.errors import ConfigError

MARK = "\ufeff"  # the byte-order mark; within a text it is a character like others

MARKS = {  # those of UTF-32 first: one begins as one of UTF-16 does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Where the first four bytes are NUL, for Latin text without a mark.
NULS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}


def without_mark(start: bytes, name: str) -> bytes:
    """The first bytes of a text, without UTF-8's byte-order mark. Raises ConfigError if it is UTF-16 or UTF-32."""
    other = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    other = other or NULS.get(tuple(byte == 0 for byte in start[:4]))
    if other is not None:
        raise ConfigError(
            f"{name}: the text is {other}, expected UTF-8; convert it, such as by `iconv -f {other} -t UTF-8 OLD > NEW`"
        )
    return start.removeprefix(codecs.BOM_UTF8)
