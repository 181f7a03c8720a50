"""python -m model sample RUN [--prompt TEXT ...]: continues a text with a trained model, any head, token by token."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.settings import ConfigError


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
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # that one process reads it, on purpose
    try:
        added = _continued(asked)
        print(asked.prompt, end="", flush=True)
        for text in added:
            print(text, end="", flush=True)
        print()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _continued(asked: argparse.Namespace) -> Iterator[str]:
    """The text that is added, as it comes. Raises ConfigError."""
    import torch  # after the arguments were read

    from model.sample import generate, texts
    from pretrain.checkpoint import find_given
    from pretrain.config import load
    from pretrain.evaluate import open_tokenizer
    from pretrain.inference import load_model
    from pretrain.ranks import Ranks

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


if __name__ == "__main__":
    sys.exit(main())
