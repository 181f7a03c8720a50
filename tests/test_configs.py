"""Every recipe in configs/ parses, says how it is run, builds on the meta device, and is what name and header tell."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.recipes import small
from common.settings import read_tree, validate
from data.config import DataConfig, DebianSource
from data.masking import masked
from launch.fit import altered
from launch.footprint import parameters
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.config import RunConfig, check_layout, dump, from_tree, load
from pretrain.modules import build_modules, hidden_states
from pretrain.optim import adamw
from pretrain.runtime.ranks import alone
from pretrain.study import language_config
from pretrain.study.algorithmic import TASKS, cell_of
from pretrain.study.algorithmic_cell import Learner
from pretrain.study.algorithmic_config import AlgorithmicConfig
from pretrain.study.vision import networks, sources
from pretrain.study.vision.config import VisionConfig

GPT2 = {"vocab_size": 50_257, "bias": True, "mlp": "gelu_tanh"}
QWEN = {"vocab_size": 151_936}
CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if not path.stem.startswith(("study-", "corpus-")))
OWN_FORM: dict[str, tuple[int, dict[str, Any]]] = {  # recipe -> published parameters, what makes the recipe that form
    "gpt2-124m": (124_439_808, GPT2),
    "gpt2-350m": (354_823_168, GPT2),
    "gpt2-774m": (774_030_080, GPT2),
    "gpt2-1.5b": (1_557_611_200, GPT2),
    "qwen2-0.5b": (494_032_768, QWEN),
    "qwen3-0.6b": (596_049_920, QWEN),
    "llama3-8b": (8_030_261_248, {"vocab_size": 128_256}),
    "bert-base": (109_482_240, {"vocab_size": 30_522}),
    "published-2502-gpt2-124m": (124_373_760, {"vocab_size": 50_304}),
    "published-2603-gpt2-124m": (124_475_904, {"vocab_size": 50_304}),
    "published-2603-qwen2-0.5b": (494_032_768, QWEN),
    "published-2603-bert": (124_084_224, {"vocab_size": 50_304}),
}
ELSEWHERE = {  # segments, and in the first a pooler, which only the original has
    "bert-base": 2 * 768 + 768 * 769,
    "published-2603-bert": 2 * 768,
}
PUBLISHED = {  # recipe -> tokens a step, rows of the published prototypes
    "published-2502-gpt2-124m": (491_520, 50_304),
    "published-2502-gpt2-124m-softmax": (491_520, 50_304),
    "published-2603-gpt2-124m": (131_072, 50_304),
    "published-2603-bert": (38_912, 50_304),
    "published-2603-qwen2-0.5b": (61_440, 151_936),
}
TRIPLES = ("gpt2-124m", "gpt2-124m-untied", "bert-base", "qwen2-0.5b")  # each also -cosine and -softmax
NAMED = {
    "124m": 124e6,
    "350m": 350e6,
    "774m": 774e6,
    "1.5b": 1.5e9,
    "8b": 8e9,
}  # of the tied form, by the end of a name
COUNTED = re.compile(
    r"^# Parameters: ([\d,]+): ([\d,]+) of the trunk(?:, ([\d,]+) of them the token embedding,)? and "
    r"([\d,]+) prototypes(, which embed tokens too)?\.", re.MULTILINE,
)  # fmt: skip
WORLDS = {
    "quickstart": (1, 2),
    "benchmark-cpu": (1, 2),
    "gpt2-124m": (1, 8, 16),
    "gpt2-350m": (8, 16),
    "gpt2-774m": (16, 32),
    "gpt2-1.5b": (16, 64),
    "qwen2-0.5b": (8, 16),
    "qwen3-0.6b": (8, 16),
    "bert-base": (1, 8),
    "llama3-8b": (64, 128),
    "published-2502-gpt2-124m": (1, 8, 16),
    "published-2603-gpt2-124m": (1, 8),
    "published-2603-bert": (1, 2),
    "published-2603-qwen2-0.5b": (1, 2),
}


def family_of(path: Path) -> str:
    return re.sub("-(untied|cosine|softmax)", "", path.stem)


def numbers(path: Path) -> tuple[int, int, int, int]:
    """All, trunk, token embedding and prototypes, as a header tells them."""
    found = COUNTED.search(path.read_text())
    assert found, f"{path} does not say how many parameters it has"
    assert bool(found[3]) != bool(found[5]), "either an embedding of its own, or the prototypes'"
    total, trunk, embedding, prototypes = (int((group or "0").replace(",", "")) for group in found.groups()[:4])
    return total, trunk, embedding, prototypes


def slow_if_large(path: Path) -> Any:
    """Dozens of layers, even without memory, take a second."""
    large = family_of(path).endswith(("774m", "1.5b", "8b"))
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if large else [])


def test_the_recipes_are_there() -> None:
    forms = {f"{backbone}{head}" for backbone in TRIPLES for head in ("", "-cosine", "-softmax")}
    forms |= {f"{name}-untied" for name in OWN_FORM if name.startswith(("gpt2", "qwen"))}
    assert {"quickstart", *forms, *OWN_FORM, *PUBLISHED} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", [slow_if_large(path) for path in CONFIGS])
def test_a_recipe_parses_builds_and_says_how_it_is_run(path: Path, tmp_path: Path) -> None:
    cfg = load(path)
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header and f"overtone prepare {path}" in header[0] and f"overtone run {path}" in header[0]
    for world in WORLDS[family_of(path)]:
        check_layout(cfg, world, min(world, 8))
    assert cfg.data.tokenizer.vocab_size % 1024 == 0
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg

    decoder, head = built(cfg)
    inputs = torch.zeros(2, cfg.model.seq_len, dtype=torch.int64, device="meta")
    hidden = decoder(head.embed(inputs) if cfg.model.tied else inputs)
    assert hidden.shape == (2, cfg.model.seq_len, cfg.model.dim)
    assert head.prototypes.shape == (cfg.model.vocab_size, cfg.model.dim)


def built(cfg: RunConfig) -> tuple[Decoder, HarmonicHead]:
    with torch.device("meta"):
        decoder = Decoder(cfg.model.model_copy(update={"compile": False}))  # there is nothing to compile for on meta
        return decoder, HarmonicHead(cfg.model.vocab_size, cfg.model.dim, seed=0, **cfg.head.arguments())


def check_numbers(path: Path, cfg: RunConfig) -> None:
    """The header, the plan and the built model agree."""
    decoder, head = built(cfg)
    trunk, rows = sum(p.numel() for p in decoder.parameters()), head.prototypes.numel()
    embedding = 0 if decoder.tokens is None else decoder.tokens.weight.numel()
    planned = parameters(cfg)
    assert (planned.trunk, planned.token_embedding) == (trunk, embedding)
    assert planned.positions == (0 if decoder.positions is None else decoder.positions.weight.numel())
    assert planned.head == sum(p.numel() for p in head.parameters())
    assert planned.total == trunk + planned.head
    assert numbers(path) == (trunk + rows, trunk, embedding, rows)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_plan_and_built_model_have_the_same_parameters(path: Path) -> None:
    check_numbers(path, load(path))


def test_a_corpus_of_packages_names_each_with_what_it_is_and_its_licence() -> None:
    path = Path("configs/corpus-debian.yaml")
    tree = read_tree(path, [])
    cfg = validate(DataConfig, tree["data"], "data")
    assert tree.keys() == {"data"} and isinstance(cfg.source, DebianSource) and cfg.test_fraction
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header and f"overtone prepare {path}" in header[0]
    names = [package.name for package in cfg.source.packages]
    guide = Path("docs/data.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9.+-]+)` \| (.+) \| (.+) \| ([\d.]+) \|$", guide, re.MULTILINE)
    assert [name for name, *_ in rows] == names == sorted(names)
    assert re.findall(r"^#   ([a-z0-9.+-]+): .+; .+$", header[0], re.MULTILINE) == names
    assert sum(float(size) for *_, size in rows) > 50


@pytest.mark.parametrize("name", ["small", "gpu", "gpu-bert", "gpu-qwen2"])
def test_a_study_says_what_its_heads_have_and_how_many_runs_it_takes(name: str) -> None:
    path = Path(f"configs/study-{name}.yaml")
    study = language_config.from_tree(read_tree(path))
    head = study.config(study.trial("softmax", 0, 0, {"lr": 1e-3}))
    check_numbers(path, head)
    runs = len(study.heads) * (sum(study.tuning.counts()) + len(study.sizes) * len(study.seeds))
    assert f"# {runs} runs of" in path.read_text() and f"overtone study {path}" in path.read_text()
    if "mahalanobis" in study.heads:
        more = parameters(study.config(study.trial("mahalanobis", 0, 0, {"lr": 1e-3}))).total - numbers(path)[0]
        assert f"Mahalanobis trains {more} more." in path.read_text()


def test_the_algorithmic_study_says_how_many_parameters_its_learners_have() -> None:
    path = Path("configs/study-algorithmic.yaml")
    study = validate(AlgorithmicConfig, read_tree(path, []))
    names = [(task, network.kind, head) for task in study.tasks for network in study.networks for head in study.heads]
    cells = [cell_of(study, name, 0.5, 1, study.choice.candidates[0]) for name in names]
    sizes = [sum(p.numel() for p in Learner(cell, TASKS[cell.task]()).parameters()) for cell in cells]
    assert f"# Parameters: {min(sizes):,} to {max(sizes):,}, by task and network." in path.read_text()


def test_the_vision_study_says_how_many_parameters_its_learners_have() -> None:
    path = Path("configs/study-vision.yaml")
    study = validate(VisionConfig, read_tree(path, []))
    examples = {name: sources.load(name, data, lambda line: None) for name, data in study.data.items()}
    sizes = [
        sum(
            p.numel()
            for p in networks.Learner(study.networks[network], head, examples[name], study.dim, 1).parameters()
        )
        for name, network in study.pairs()
        for head in study.heads.values()
    ]
    told = f"# Parameters: {min(sizes):,} to {max(sizes):,}, by data set, network and head.\n"
    assert told in path.read_text() and f"# overtone study {path}\n" in path.read_text()
    cells = len(study.pairs()) * len(study.heads)
    cells *= study.tuning.trials * len(study.tuning.seeds) + len(study.seeds)
    assert f"# {cells} cells" in path.read_text()


@pytest.mark.parametrize("path", [path for path in CONFIGS if family_of(path) in OWN_FORM], ids=lambda path: path.stem)
def test_a_recipe_is_what_it_is_called(path: Path) -> None:
    """Tied where the original is, unless its name says untied; with the original's parameters, biases and vocabulary
    apart, which its header tells.
    """
    cfg, family = load(path), family_of(path)
    assert cfg.model.tied == ("-untied" not in path.stem and family != "llama3-8b")
    for head in ("cosine", "softmax"):
        assert (cfg.head.distance == {"softmax": "dot"}.get(head, head)) == path.stem.endswith(head)
    published, changes = OWN_FORM[family]
    own = altered(cfg, model={**changes, "tied": family != "llama3-8b"})
    assert sum(p.numel() for module in built(own) for p in module.parameters()) == published - ELSEWHERE.get(family, 0)
    if "-untied" not in path.stem:
        assert f"{published:,}" in path.read_text()
    size = NAMED.get(family.rpartition("-")[2])
    if size is not None and "-untied" not in path.stem:
        assert numbers(path)[0] == pytest.approx(size, rel=0.05)


def triple(backbone: str) -> list[RunConfig]:
    return [load(f"configs/{backbone}{head}.yaml") for head in ("", "-cosine", "-softmax")]


@pytest.mark.parametrize("backbone", TRIPLES)
def test_recipes_of_a_triple_differ_in_the_head_alone(backbone: str) -> None:
    """And start from the same decoder."""

    def without_head(cfg: RunConfig) -> dict:
        return {key: value for key, value in cfg.model_dump().items() if key not in ("run", "head")}

    heads = triple(backbone)
    euclidean, cosine, softmax = heads
    assert without_head(euclidean) == without_head(cosine) == without_head(softmax)
    assert [cfg.head.distance for cfg in heads] == ["euclidean", "cosine", "dot"]
    first, *others = (dict(build_modules(small(cfg), alone())[0].named_parameters()) for cfg in heads)
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)


def commands(path: Path) -> list[list[str]]:
    """The overrides of every command of a header that trains the recipe, which may have none."""
    told = re.findall(rf"^# overtone run {re.escape(str(path))}(.*)$", path.read_text(), re.MULTILINE)
    return [[word for word in shlex.split(line.partition(8 * " ")[0]) if "=" in word] for line in told]


def losses_of_steps(cfg: RunConfig, steps: int) -> list[float]:
    """On one batch, at a rate so small that steps go downhill whatever the exponent is; every parameter is moved."""
    decoder, head = build_modules(cfg, alone())
    decoder.eval()  # no dropout
    modules = {"decoder": decoder, "head": head}
    parameters = {f"{k}.{name}": p for k, module in modules.items() for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizers = [adamw(module, cfg.optim.model_copy(update={"lr": 1e-5})) for module in modules.values()]
    stream = np.random.default_rng(1)
    batch = stream.integers(5, cfg.model.vocab_size, (2, cfg.model.seq_len + 1))
    inputs, targets = batch[:, :-1], batch[:, 1:]
    if not cfg.model.causal:
        inputs, targets = masked(inputs, np.arange(2), 1, mask_id=4, vocab_size=cfg.model.vocab_size)
    losses = []
    for _ in range(steps):
        hidden = hidden_states(decoder, head, torch.from_numpy(inputs), cfg, None)
        loss = head(hidden, torch.from_numpy(targets))
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not [name for name, p in parameters.items() if torch.equal(p, before[name])]
    return losses


@pytest.mark.parametrize("name", [*PUBLISHED, *(f"{b}{h}" for b in TRIPLES[2:] for h in ("", "-cosine", "-softmax"))])
def test_every_command_of_a_header_trains(name: str) -> None:
    path = Path(f"configs/{name}.yaml")
    assert [] in commands(path)
    runs = [load(path, overrides) for overrides in commands(path)]
    assert len({cfg.run for cfg in runs}) == len(runs), "one run folder each"
    for cfg in runs:
        tiny = altered(small(cfg), model={"seq_len": 48}, train={"precision": "float32"})
        first, second, third = losses_of_steps(tiny, 3)
        assert math.inf > first > second > third, cfg.head


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_as_it_was_published(name: str) -> None:
    """The code's power is on d^2, so n is doubled; its final states have unit variance, and it turns no sign."""
    cfg, header = load(f"configs/{name}.yaml"), Path(f"configs/{name}.yaml").read_text().replace("\n# ", " ")
    tokens, rows = PUBLISHED[name]
    assert (cfg.train.tokens_per_step, cfg.train.steps, cfg.head.tied_sign) == (tokens, 10_000, 1)
    assert cfg.hidden_length() == pytest.approx(cfg.model.dim**0.5, abs=1e-4)
    if cfg.head.distance == "euclidean":
        assert cfg.head.exponent == 2 * cfg.model.dim
        assert f"the squared distance to the power -{cfg.model.dim}, which is n = {2 * cfg.model.dim}" in header
    # with 0.01/V added to each and all divided by their sum, no probability is smaller
    assert f"at most {math.log(1.01 * rows / 0.01):.2f} nats" in header


@pytest.mark.parametrize(("backbone", "recipe"), [("bert", "bert-base"), ("qwen2", "qwen2-0.5b")])
def test_studies_of_backbones_compare_the_same_heads(backbone: str, recipe: str) -> None:
    """With the same seeds, on the same text; and the blocks are those of the full size."""
    gpt, other = (language_config.from_tree(read_tree(f"configs/study-gpu{n}.yaml")) for n in ("", f"-{backbone}"))
    for same in ("heads", "baseline", "seeds", "lr_floor", "corpus"):
        assert getattr(gpt, same) == getattr(other, same)
    assert all(gpt.space(head).keys() == other.space(head).keys() for head in gpt.heads)
    ours, gpts = (study.config(study.trial("softmax", 0, 0, {"lr": 1e-3})) for study in (other, gpt))
    assert (ours.data, ours.train.tokens_per_step) == (gpts.data, gpts.train.tokens_per_step)
    sizes = {"vocab_size", "seq_len", "layers", "heads", "kv_heads", "dim", "mlp_dim"}
    blocks = [
        cfg.model.model_dump(exclude={*sizes, "tied", "dropout"}) for cfg in (ours, load(f"configs/{recipe}.yaml"))
    ]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("path", [path for path in CONFIGS if "-untied" in path.stem], ids=lambda path: path.stem)
def test_an_untied_recipe_differs_in_that_alone(path: Path) -> None:
    untied, tied = load(path), load(path.with_name(path.name.replace("-untied", "")))
    tree = untied.model_dump(mode="json")
    of_a_published_run = {"init_std": "gpt2", "tied_sign": 1} if untied.head.distance == "dot" else {}
    made = from_tree({**tree, "model": {**tree["model"], "tied": True}, "head": {**tree["head"], **of_a_published_run}})
    assert made.model_dump(exclude={"run"}) == tied.model_dump(exclude={"run"})
    assert str(untied.run) == f"runs/{path.stem}"


def test_nothing_names_a_recipe_that_is_not_there() -> None:
    pages = [
        Path("README.md"),
        *Path("docs").glob("*.md"),
        *Path("benchmarks").rglob("*.md"),
        *Path("configs").glob("*"),
    ]
    sources = [path for folder in ("launch", "pretrain", "benchmarks", "tests") for path in Path(folder).rglob("*.py")]
    for path in [*pages, *sources]:
        text = path.read_text()
        named = set(re.findall(r"configs/[\w.-]+?\.yaml", text))
        if path.suffix in (".md", ".yaml"):
            named |= {f"configs/{name}" for name in re.findall(r"(?<![\w/.-])(?:gpt2|qwen|llama)[\w.-]*?\.yaml", text)}
        assert not [name for name in named if not Path(name).is_file()], path
