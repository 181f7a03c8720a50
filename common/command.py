"""What all commands share: how their help looks, how they read words in any order, and how they end.

A command is a module with `parser()` and `main(argv=None) -> int`. It imports what is heavy after its words were read,
so that help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED

ALLOW_CODE = "--allow-different-code"
WIDTH = 100  # characters of a line of help
CODES = "0 done; 2 bad input; 130 interrupted"


def parser(name: str, about: str, examples: Sequence[str], codes: str = CODES) -> argparse.ArgumentParser:
    """A parser of `overtone NAME`.

    Args:
        about: what the command does, in sentences.
        examples: what follows `overtone NAME` in commands that work.
        codes: its exit codes.
    """
    shown = "\n".join(f"  overtone {name} {example}".rstrip() for example in examples)
    return argparse.ArgumentParser(
        prog=f"overtone {name}",
        description=textwrap.fill(about, WIDTH),
        epilog=f"examples:\n{shown}\n\n" + textwrap.fill(f"exit codes: {codes}", WIDTH),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(
    parser: argparse.ArgumentParser, example: str = "configs/quickstart.yaml", *, optional: str = ""
) -> None:
    """CONFIG and its settings; `optional`: what CONFIG is for where it may be left out."""
    about = optional or f"YAML file, such as {example}"
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help=about)
    add_settings(parser, "train.steps=100")


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """`key=value` settings, any number of them, as `overrides`; `example`: one that helps here."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"changes a setting, such as {example}")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, which `RunFolder.containing` and `RunFolder.checkpoint` resolve."""
    about = "a run folder (its newest whole checkpoint), or one checkpoint's folder"
    parser.add_argument("run", metavar="RUN", help=about)


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Options of what runs on many ranks: whether their code may differ; and what the deepspeed launcher adds to a
    rank's words, which has it in its environment too.
    """
    add_allow_code(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Whether hosts may run different code, as `allow_different_code`."""
    about = "hosts may differ in the checkout's files and in versions of packages, which is an error else"
    parser.add_argument(ALLOW_CODE, action="store_true", help=about)


def count(text: str) -> int:
    """An option's number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give 1 or more")
    return number


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, strict: bool = True
) -> argparse.Namespace:
    """Reads options, CONFIG or RUN, and settings, in any order. Ends the program for a word that it does not know.

    Args:
        strict: a word that is neither an option nor `key=value` ends it too; else it is left among the settings.
    """
    asked, unknown = parser.parse_known_intermixed_args(argv)
    expected = "one of the options"
    if "overrides" in asked:
        subject = "config" if "config" in asked else "run"
        words = [word for word in (getattr(asked, subject), *asked.overrides) if word is not None]
        first = next((word for word in words if "=" not in word), words[0] if words else None)
        setattr(asked, subject, first)
        asked.overrides = [word for word in words if word is not first]
        unknown = [word for word in unknown if word.startswith("-") or "=" not in word]
        unknown += [word for word in asked.overrides if strict and "=" not in word]
        expected = "key=value or one of the options"
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown: {' '.join(unknown)}{did_you_mean(unknown[0], options)}; expected {expected}")
    return asked


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: the known word nearest to a word, or to its part before `=`; empty if none is near."""
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def run(work: Callable[[argparse.Namespace], int | None], asked: argparse.Namespace) -> int:
    """Does a command's work; its exit code. What is wrong with the input goes to standard error."""
    try:
        with _interruptible():
            return work(asked) or 0
    except ConfigError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return _interrupted()
    finally:
        atexit.unregister(_stop_listening)
        atexit.register(_stop_listening)  # the last to be registered is the first that is called


_at_once = False  # what Ctrl-C raises now may be swallowed, or printed


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C in the block raises KeyboardInterrupt, so that what is under way is left in order; in `leaving_at_once`,
    and the second time, it ends the process.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before not in (signal.default_int_handler, signal.SIG_DFL):
        yield  # somebody else listens
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: object) -> None:
    if _at_once:
        end_at_once()
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


def end_at_once(*_: object) -> NoReturn:
    """Ends the process as interrupted, whatever it is at."""
    with suppress(OSError, ValueError, RuntimeError):  # it may be printing right now
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Around what would swallow an exception that Ctrl-C raises, and leaves nothing half done: it ends the process."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        yield
    finally:
        _at_once = before


def leaves_at_once() -> bool:
    """Whether `leaving_at_once` is around what this process does now."""
    return _at_once


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _stop_listening() -> None:
    """At the end of the process: its code is known, and Python would print a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        with suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and DeepSpeed, which make hundreds of thousands of objects that stay: Python does not
    look through them for garbage, neither meanwhile nor when DeepSpeed asks it to, which is often. Ctrl-C ends the
    process at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with leaving_at_once():
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def refuse(error: ConfigError, *, says: bool = True) -> int:
    """The exit code of bad input, told unless another rank does."""
    if says:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT


def dispatch(argv: Sequence[str], modules: Mapping[str, str], about: str) -> int:
    """Hands words to the command that the first of them names.

    Args:
        modules: where each command is.
        about: what --help says.
    """
    if not argv:
        print(about, file=sys.stderr)
        return EXIT_BAD_INPUT
    name, *words = argv
    if name in ("-h", "--help"):
        print(about)
        return 0
    if name not in modules:
        near = did_you_mean(name, modules) or f"; expected one of {', '.join(modules)}"
        return refuse(ConfigError(f"{name}: unknown command{near}"))
    try:
        code: int = import_module(modules[name]).main(words)
    except KeyboardInterrupt:
        return _interrupted()
    return code
