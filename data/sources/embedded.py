"""The embedded corpus: pydoc topics and the docstrings of the standard library, about 2 MB of English on any Python."""

import ast
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "pydoc_data"}

# Modules written in C keep their docstrings in the binary. Importing these has no effect that anyone could notice.
C_MODULES = """
builtins sys math cmath itertools time gc marshal errno posix array binascii zlib unicodedata select mmap fcntl
resource _collections _functools _operator _io _datetime _struct _decimal _random _bisect _heapq _statistics _json
_pickle _csv _socket _ssl _hashlib _thread _queue _weakref _ctypes _sqlite3 _elementtree _lzma _bz2 _zoneinfo _asyncio
_contextvars _codecs _sre _signal _warnings _abc _string _locale _curses _posixsubprocess _tracemalloc atexit
faulthandler pyexpat
"""


@cache
def embedded_texts() -> tuple[str, ...]:
    """The embedded corpus: one document for each pydoc topic and for each module; no docstring twice."""
    seen: set[str] = set()

    def document(parts: Iterator[str | None]) -> str:
        fresh = []
        for text in map(_clean, parts):
            if text and text not in seen:
                seen.add(text)
                fresh.append(text)
        return "\n\n".join(fresh)

    documents = [document(iter([text])) for _, text in sorted(_topics().items())]
    documents += [document(_docstrings(file)) for file in _sources()]
    documents += [document(_binary_docstrings(name)) for name in C_MODULES.split()]
    return tuple(text for text in documents if text)


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions split it off
        return {}


def _sources() -> list[Path]:
    """Source files of the standard library, without tests and bundled packages, by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    return [root / file for file in sorted(relative) if not LEFT_OUT & set(file.parts)]


def _docstrings(file: Path) -> Iterator[str | None]:
    """Docstrings of a source file, in source order; read, never run."""
    with warnings.catch_warnings(action="ignore"):  # some modules spell a backslash in a way that warns
        nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False)
        if not isinstance(node, ast.expr):  # docstrings live in statements, and expressions are most of a tree
            nodes.extend(reversed(list(ast.iter_child_nodes(node))))


def _binary_docstrings(name: str) -> Iterator[str | None]:
    """Docstrings of a module written in C: its own, then those of its functions, classes and their members, by name.

    Functions written in Python are left out: they are hooks that the running program put there (sys.excepthook).
    """
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this machine
        return
    yield module.__doc__
    for _, value in sorted(vars(module).items()):
        if inspect.isbuiltin(value) or inspect.isclass(value):
            yield value.__doc__
        if inspect.isclass(value):
            for _, member in sorted(vars(value).items()):
                if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                    yield member.__doc__


def _clean(text: object) -> str:
    """Docstring as prose: common indent, trailing blanks and control characters (but the newline) taken off."""
    if not isinstance(text, str):
        return ""
    lines = CONTROL.sub("", inspect.cleandoc(text)).split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")
