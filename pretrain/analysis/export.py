"""python -m model sample RUN [--prompt TEXT ...]: continues a text with a trained model, any head, token by token.
python -m model export RUN --out FOLDER: a folder that the transformers library loads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError

if TYPE_CHECKING:  # --help does without
    from pretrain.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 for input that cannot be used (the reason is on standard error)."""
    parser = argparse.ArgumentParser(prog="python -m model", description="Use a trained model.")
    commands = parser.add_subparsers(dest="command", required=True)
    purpose = "continue a text"
    sample = commands.add_parser("sample", help=purpose, description=purpose.capitalize() + ".")
    sample.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    sample.add_argument("--prompt", default="", help="the text to go on from (default: a new document)")
    sample.add_argument("--tokens", type=int, help="most tokens to add (default: as many as there are positions for)")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default %(default)s)")
    sample.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone")
    sample.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that together reach P alone")
    sample.add_argument("--seed", type=int, help="the same seed draws the same tokens (default: another each time)")
    purpose = "write a folder that the transformers library loads"
    export = commands.add_parser("export", help=purpose, description=purpose.capitalize() + ".")
    export.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    export.add_argument("--out", type=Path, required=True, help="a new folder")
    asked = parser.parse_args(arguments)
    try:
        _export(asked.run, asked.out) if asked.command == "export" else _sample(asked)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _sample(asked: argparse.Namespace) -> None:
    added = _continued(asked)
    print(asked.prompt, end="", flush=True)
    for text in added:
        print(text, end="", flush=True)
    print()


def _continued(asked: argparse.Namespace) -> Iterator[str]:
    """The text that is added, as it comes. Raises ConfigError."""
    import torch  # after the arguments were read

    from model.sample import generate, texts
    from pretrain.analysis.evaluation import open_tokenizer
    from pretrain.analysis.inference import load_model
    from pretrain.checkpoints.folder import find_given
    from pretrain.config import load
    from pretrain.runtime.ranks import Ranks

    checkpoint, run = find_given(asked.run)
    cfg = load(run / "config.yaml")
    tokenizer = open_tokenizer(cfg.data.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"compile": False})})  # passes differ in length
    model = load_model(checkpoint, cfg, tokenizer.sha256, tokenizer.eos_id, Ranks(0, 1, 0, 1, device))

    given = [tokenizer.eos_id, *tokenizer.encode(asked.prompt)]  # which opens a document
    draws = torch.Generator(device)
    draws.seed() if asked.seed is None else draws.manual_seed(asked.seed)
    try:
        drawn = generate(
            model.decoder,
            model.head,
            torch.tensor([given], device=device),
            max_tokens=max(0, cfg.model.seq_len + 1 - len(given)) if asked.tokens is None else asked.tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            stop=(tokenizer.eos_id,),
            generator=draws,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return texts((int(one) for one in drawn), tokenizer.decode, given)


def _export(given: Path, out: Path) -> None:
    """Writes the folder `out`, whole or not at all. Raises ConfigError."""
    from data.shards import TOKENIZER  # after the arguments were read
    from model.hf import folder as export
    from pretrain.analysis.evaluation import open_tokenizer
    from pretrain.analysis.inference import fitting_state
    from pretrain.checkpoints.folder import find_given, run_of
    from pretrain.checkpoints.weights import (
        MAX_GB,
        new_folder,
        shapes,
        without_weights,
        write_weights,
    )
    from pretrain.config import dump, load

    cfg = load(run_of(given) / "config.yaml")
    tokenizer = open_tokenizer(cfg.data.path)
    with new_folder(out) as folder:
        checkpoint, run = find_given(given)
        state = fitting_state(checkpoint, cfg, tokenizer.sha256)
        decoder, head = without_weights(cfg)
        head.progress = cfg.head_progress(state["step"] - 1)
        size = write_weights(checkpoint, shapes(decoder, head), folder, MAX_GB * 1e9)
        shutil.copyfile(cfg.data.path / TOKENIZER, folder / TOKENIZER)
        card = export.card(run.name, cfg.model, head, _facts(run, state, cfg, size // 4), dump(cfg))
        export.write(folder, decoder, head, tokenizer.eos_id, tokenizer.pad_id, card)
    print(f"{out}: {size / 1e9:.3g} GB of weights of {checkpoint}")


def _facts(run: Path, state: Mapping[str, Any], cfg: RunConfig, parameters: int) -> dict[str, str]:
    """What a run had come to at a checkpoint, by name."""
    from pretrain.analysis.inference import DATA
    from pretrain.analysis.inference import TOKENIZER as VOCABULARY
    from pretrain.analysis.scoring import figure
    from pretrain.checkpoints.folder import total_j
    from pretrain.metrics import clock, read_records

    recorded = read_records(run) if (run / "metrics.jsonl").exists() else []
    before = [one for one in recorded if one["kind"] == "eval" and one["step"] <= state["step"]]
    held_out = before[-1] if before else {}
    joules, identity = total_j(state["joules"]), state["identity"]
    forms = {
        figure(cfg.model): "perplexity",
        "nats/token": "loss",
        "bits/byte": "bits_per_byte",
        "accuracy": "accuracy",
    }
    return {
        "parameters": f"{parameters:,}",
        "updates": f"{state['step']:,} of {cfg.train.steps:,}",
        "training tokens": f"{state['tokens']:,}",
        "training time (h:mm:ss)": clock(state["train_seconds"]),
        "energy, of all phases": "not measured"
        if joules is None
        else f"{joules:,.0f} J ({', '.join(state['joules'])})",
        "precision of training": f"{cfg.train.precision}; the weights here are the float32 masters",
        **{f"held-out {name}": _figure(held_out.get(key)) for name, key in forms.items()},
        "held-out figures are of update": f"{held_out['step']:,}" if held_out else "not measured",
        "fingerprint of the data": f"`{identity[DATA]}`",
        "SHA-256 of the vocabulary": f"`{identity[VOCABULARY]}`",
        "trained with": ", ".join(
            f"{name} {version}" for name, version in state.get("versions", {}).items() if version
        ),
    }


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
