"""`overtone COMMAND ...`: one command for all, from any directory.

The table is the only list of commands; each entry's module has `parser()` and `main(argv) -> exit code`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.starting  # noqa: F401

import os
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from common.checkout import ROOT, python_path
from common.command import dispatch


class Command(NamedTuple):
    """A row of the table."""

    group: str  # under which --help lists it
    module: str  # dotted name; imported when the command is given
    about: str  # for --help


TABLE = {
    "prepare": Command("data", "data.commands.prepare", "turn text into a tokenizer and token shards, once"),
    "import": Command("data", "data.commands.importing", "take the token files of nanoGPT or llm.c"),
    "inspect": Command("data", "data.commands.inspect", "tell what prepared data hold"),
    "verify-data": Command("data", "data.commands.verify", "compare prepared data with their hashes"),
    "run": Command("train", "launch.run", "check a config, its data and the hosts, then train it with deepspeed"),
    "train": Command("train", "pretrain.__main__", "train a config on one process, without a launcher"),
    "study": Command("train", "pretrain.study.__main__", "train a matched grid of heads, rates and seeds, and compare"),
    "evaluate": Command("look", "pretrain.evaluate", "held-out perplexity and bits/byte of a run"),
    "report": Command("look", "pretrain.report", "what runs came to, side by side"),
    "sample": Command("look", "pretrain.sample", "continue a text"),
    "export": Command("look", "cli.export", "write a checkpoint for transformers, or as plain safetensors"),
    "verify": Command("look", "pretrain.verify", "is a run folder whole, and does its training repeat?"),
    "plan": Command("launch", "launch.plan", "what a config will take: memory, traffic, time and energy"),
    "doctor": Command("launch", "launch.doctor", "what would keep a job from running on these hosts"),
    "slurm": Command("launch", "launch.slurm", "write an sbatch script that runs a job, and submit it"),
    "completion": Command("shell", "cli.completion", "what a shell needs to complete all this"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the command's exit code; 2 for a command that there is not. `argv`: None takes the process's words."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from cli.completion import complete

        complete({name: command.module for name, command in TABLE.items()})
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if words == ["--version"]:
        print(f"overtone {version()}")
        return 0
    os.environ.update(python_path())  # for the processes that it starts
    return dispatch(words, {name: command.module for name, command in TABLE.items()}, table())


def table() -> str:
    """What --help says."""
    lines = ["usage: overtone COMMAND ...", "", "Pretrains language models under harmonic loss.", ""]
    for group, entries in groupby(TABLE.items(), lambda entry: entry[1].group):
        lines += [f"{group}:", *(f"  {name:<12} {command.about}" for name, command in entries)]
    return "\n".join([*lines, "", "`overtone help COMMAND` tells its options, with examples; `overtone --version`."])


def version() -> str:
    """As model/__init__.py has it, which is not imported: it may bring torch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "model" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "model/__init__.py has no version"
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
