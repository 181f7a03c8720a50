"""`overtone completion SHELL`, and what a shell is told when TAB is pressed: commands, options, files, settings.

The library argcomplete speaks with the shell. Settings are those of the configuration's own models, so a new one is
completed as soon as it is there.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from common import command
from common.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


def parser() -> argparse.ArgumentParser:
    """The shell's name, one of SHELLS."""
    made = command.parser(
        "completion",
        "Print what a shell needs to complete commands, options, files, run folders and settings. For bash, put "
        '`eval "$(overtone completion bash)"` into ~/.bashrc; for zsh the same with zsh into ~/.zshrc, behind '
        "`compinit`; for fish see the example.",
        ["bash >> ~/.bashrc", "zsh >> ~/.zshrc", "fish > ~/.config/fish/completions/overtone.fish"],
    )
    made.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what the shell is to run; exit code 2 where argcomplete is not installed."""
    return command.run(_print, command.parse(parser(), argv))


def _print(asked: argparse.Namespace) -> None:
    try:
        import argcomplete
    except ImportError:
        raise ConfigError(
            f"argcomplete is not installed, which completion needs: `{sys.executable} -m pip install argcomplete`"
        ) from None
    print(argcomplete.shellcode(["overtone"], shell="fish" if asked.shell == "fish" else "bash"))  # zsh: bash's too


def complete(modules: Mapping[str, str]) -> NoReturn:
    """Answers the shell, which asks by environment variables; `modules`: where each command is."""
    try:
        from argcomplete import CompletionFinder
        from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter
        from argcomplete.lexers import split_line
    except ImportError:
        sys.exit(1)

    class Finder(CompletionFinder):
        def _complete_active_option(self, parser: Any, *rest: Any) -> Any:
            """Argcomplete takes an option to end what may stand by its position; here words come in any order."""
            positional = [action for action in parser._get_positional_actions() if action not in parser.active_actions]
            parser.active_actions += positional
            return super()._complete_active_option(parser, *rest)

    start = int(os.environ["_ARGCOMPLETE"])
    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][start:]
    if words[:1] == ["help"] or not words or words[0] not in modules:
        made = argparse.ArgumentParser()
        made.add_argument("--version", action="store_true")
        made.add_argument("command", choices=[*modules, *["help"] * (not words)])
        skipped = len(words[:1])
    else:
        made, skipped = import_module(modules[words[0]]).parser(), 1
    os.environ["_ARGCOMPLETE"] = str(start + skipped)  # for argcomplete, the command is the program from here on
    of_data = bool(words) and modules.get(words[0], "").startswith("data.")
    completers = {
        "CONFIG": FilesCompleter(("yaml", "yml")),
        "RUN": run_folders,
        "FILE": FilesCompleter(),
        "H": FilesCompleter(),
        "DIR": DirectoriesCompleter(),
        "FOLDER": DirectoriesCompleter(),
        "key=value": lambda prefix, **_: changes(prefix, "data." if of_data else ""),
    }
    for action in made._actions:
        if action.metavar in completers:
            action.completer = completers[action.metavar]  # type: ignore[attr-defined, index]
    Finder()(made, always_complete_options="long", default_completer=SuppressCompleter())
    sys.exit(0)


def run_folders(prefix: str, **_: Any) -> Iterator[str]:
    """The run folders whose paths begin with `prefix`, and, with a slash, the folders on the way to others."""
    for folder in glob.glob(f"{glob.escape(prefix)}*/"):
        yield folder.rstrip("/") if Path(folder, "config.yaml").is_file() else folder


def changes(prefix: str, section: str = "") -> list[str]:
    """What may stand for `key=value`: keys in `section` as far as `=`, or one with each of its values."""
    from pretrain.config import RunConfig

    known = {path: values for path, values in settings(RunConfig).items() if path.startswith(section)}
    key, equals, _ = prefix.partition("=")
    return [f"{key}={value}" for value in known.get(key, [])] if equals else [f"{path}=" for path in known]


def settings(model: type[Any]) -> dict[str, list[str]]:
    """Every setting of a pydantic model and of those in it: the values of its Literals by dotted path."""
    from pydantic import BaseModel

    from common.settings import members_of

    found: dict[str, list[str]] = {}
    for name, field in model.model_fields.items():
        members = members_of(field.annotation)
        models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        for path, values in ((p, v) for one in models for p, v in settings(one).items()):
            found.setdefault(f"{name}.{path}", []).extend(values)
        literals = [str(value) for member in members if get_origin(member) is Literal for value in get_args(member)]
        values = literals + ["true", "false"] * (bool in members)
        if values or not models:
            found[name] = values
    return found
