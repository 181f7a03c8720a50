"""Settings: what is accepted, and what the message says when it is not."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from common.errors import ConfigError
from common.settings import read_tree, validate
from data.config import DataConfig, FilesSource, HubSource

DATA = """
data:
  path: prepared
  source: {kind: files, paths: [a.txt, b/*.jsonl]}
  tokenizer: {vocab_size: 4096}
  val_fraction: 5e-2
"""


def tree_of(tmp_path: Path, text: str, *overrides: str) -> dict:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return read_tree(file, overrides)


def data_of(tmp_path: Path, *overrides: str) -> DataConfig:
    return validate(DataConfig, tree_of(tmp_path, DATA, *overrides)["data"], "data")


def test_a_config_is_read(tmp_path):
    cfg = data_of(tmp_path, "data.tokenizer.model=m.model", "data.limit_documents=5")
    assert cfg.path == Path("prepared")
    assert isinstance(cfg.source, FilesSource) and cfg.source.paths == ("a.txt", "b/*.jsonl")
    assert cfg.tokenizer.model == Path("m.model")
    assert cfg.val_fraction == 0.05
    assert (cfg.dtype, cfg.shard_tokens, cfg.limit_documents) == ("uint16", 100_000_000, 5)


def test_openwebtext_is_a_name_for_the_hub(tmp_path):
    source = data_of(tmp_path, "data.source={kind: openwebtext}").source
    assert isinstance(source, HubSource)
    assert (source.name, source.split, source.text_field) == ("Skylion007/openwebtext", "train", "text")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("-2E+5", -2e5),
        (".5e1", 5.0),
        ("1.5e-3", 1.5e-3),
        ("0.1e1", 1.0),
        ("6_000e0", 6000.0),
    ],
)
def test_plain_floats_are_floats_in_the_file_and_in_overrides(tmp_path, text, value):
    tree = tree_of(tmp_path, f"a: {text}", f"b.c={text}")
    assert tree == {"a": value, "b": {"c": value}}
    assert isinstance(tree["a"], float) and isinstance(tree["b"]["c"], float)


def test_what_is_no_float_stays_a_string(tmp_path):
    assert tree_of(tmp_path, "a: [e3, 3e, 1e3x, '3e-4', v1e3]")["a"] == ["e3", "3e", "1e3x", "3e-4", "v1e3"]


def test_overrides_apply_in_order_and_make_mappings(tmp_path):
    tree = tree_of(tmp_path, "a: {b: 1}\nn: null", "a.b=2", "a.c.d=[1, x]", "a.b=3", "n.k=", "e=p=q")
    assert tree == {"a": {"b": 3, "c": {"d": [1, "x"]}}, "n": {"k": None}, "e": "p=q"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1\nb: 2", [], "config.yaml, line 2: not valid YAML"),
        ("a: 1\nb: 2\na: 3", [], "config.yaml, line 3: not valid YAML: the key 'a' is given twice"),
        ("x: {a: 1, a: 1}", [], "line 1: not valid YAML: the key 'a' is given twice"),
        ("- 1", [], "top level must be a mapping"),
        ("", [], "top level must be a mapping"),
        ("a: 1", ["a"], "override 'a': expected key=value"),
        ("a: 1", ["=1"], "override '=1': expected key=value"),
        ("a: 1", ["a..b=1"], "expected key=value"),
        ("a: 1", ["a.b=1"], "override 'a.b=1': a is 1, not a mapping"),
        ("a: {b: [1]}", ["a.b.c=1"], "a.b is [1], not a mapping"),
        ("a: 1", ["a=[1"], "override 'a=[1', line 1: not valid YAML"),
    ],
)
def test_files_and_overrides_that_cannot_be_read(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError) as error:
        tree_of(tmp_path, text, *overrides)
    assert message in str(error.value)


def test_a_missing_or_binary_file_or_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; give the path of a YAML file"):
        read_tree(tmp_path, [])
    with pytest.raises(ConfigError, match="no such file"):
        read_tree(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_tree(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sorce={}"], "data.sorce: unknown key; did you mean data.source?"),
        (["data.zzz=1"], "data.zzz: unknown key; the keys of data are path, source, tokenizer"),
        (
            ["data.tokenizer.vocabsize=1"],
            "data.tokenizer.vocabsize: unknown key; did you mean data.tokenizer.vocab_size?",
        ),
        (["data.source.seperator=x"], "data.source.seperator: unknown key; did you mean data.source.separator?"),
        (
            ["data.source.kind=file"],
            'data.source.kind: given "file"; expected one of embedded, files, hub, openwebtext',
        ),
        (["data.source={}"], "data.source.kind: missing; expected one of embedded, files, hub, openwebtext"),
        (["data.source=embedded"], 'data.source: given "embedded"; expected a mapping'),
        (["data.source.paths=a.txt"], 'data.source.paths: given "a.txt"; expected a list'),
        (["data.source.paths=[a, 1]"], "data.source.paths.1: given 1; expected a valid string"),
        (["data.source.paths=[]"], "data.source.paths"),
        (["data.path="], "data.path: given empty (null); expected a valid string"),
        (["data.tokenizer={}"], "data.tokenizer.vocab_size: missing"),
        (["data.tokenizer.vocab_size='4096'"], 'data.tokenizer.vocab_size: given "4096"; expected a valid integer'),
        (["data.tokenizer.vocab_size=true"], "data.tokenizer.vocab_size: given true; expected a valid integer"),
        (["data.tokenizer.vocab_size=1.5"], "data.tokenizer.vocab_size: given 1.5; expected a valid integer"),
        (["data.val_fraction=true"], "data.val_fraction: given true; expected a valid number"),
        (["data.val_fraction=0"], "data.val_fraction: given 0; expected greater than 0"),
        (["data.val_fraction=1"], "data.val_fraction: given 1; expected less than 1"),
        (["data.val_fraction=.nan"], "data.val_fraction: given nan; expected a finite number"),
        (["data.dtype=int8"], "data.dtype: given \"int8\"; expected 'uint16' or 'uint32'"),
        (["data.tokenizer.vocab_size=65537"], "data: tokenizer.vocab_size=65537 does not fit dtype uint16"),
    ],
)
def test_wrong_settings_are_named(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        data_of(tmp_path, *overrides)
    assert str(error.value).startswith(message)


def test_a_date_is_a_fine_string(tmp_path):
    source = data_of(tmp_path, "data.source={kind: hub, revision: 2024-01-02}").source
    assert isinstance(source, HubSource) and source.revision == "2024-01-02"


def test_a_vocabulary_may_fill_its_type(tmp_path):
    assert data_of(tmp_path, "data.tokenizer.vocab_size=65536").tokenizer.vocab_size == 65536
    assert data_of(tmp_path, "data.tokenizer.vocab_size=65537", "data.dtype=uint32").dtype == "uint32"


def test_every_problem_has_a_line(tmp_path):
    with pytest.raises(ConfigError) as error:
        data_of(tmp_path, "data.dtype=int8", "data.shard_tokens=x", "data.source.text=y")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "data.source.text",
        "data.dtype",
        "data.shard_tokens",
    ]


class Circle(BaseModel, extra="forbid", frozen=True):
    shape: Literal["circle"]
    radius: float = 1.0


class Square(BaseModel, extra="forbid", frozen=True):
    shape: Literal["square"]
    side: float = 1.0
    even: bool = False


class Drawing(BaseModel, extra="forbid", frozen=True):
    shapes: list[Annotated[Circle | Square, Field(discriminator="shape")]] = []
    named: dict[str, Circle] = {}
    extra: Square | None = None
    exponent: float | Literal["sqrt_dim", "learned"] = "sqrt_dim"
    pair: tuple[int, str] = (1, "a")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"shapes": [{"shape": "circle"}, {"shape": "square", "sides": 2}]},
            "shapes.1.sides: unknown key; did you mean",
        ),
        ({"shapes": [{"shape": "square", "even": 1}]}, "shapes.0.even: given 1; expected a valid boolean"),
        ({"shapes": [{"shape": "oval"}]}, 'shapes.0.shape: given "oval"; expected one of circle, square'),
        ({"named": {"square": {"shape": "circle", "radios": 1}}}, "named.square.radios: unknown key; did you mean "),
        ({"extra": {"shape": "square", "sid": 1}}, "extra.sid: unknown key; did you mean extra.side?"),
        ({"exponent": "sqrt"}, "exponent: given \"sqrt\"; expected a valid number or 'sqrt_dim' or 'learned'"),
        ({"pair": [1, 2]}, "pair.1: given 2; expected a valid string"),
        ({"exponnent": 2}, "exponnent: unknown key; did you mean exponent?"),
        ([1], "the top level: given [1]; expected a mapping"),
        ({"named": {(1, 2): 3}}, "the top level: expected plain keys"),
    ],
)
def test_paths_lead_through_unions_lists_and_mappings(tree, message):
    with pytest.raises(ConfigError) as error:
        validate(Drawing, tree)
    assert str(error.value).startswith(message)


def test_fine_values_pass_strictness():
    drawing = validate(Drawing, {"exponent": 28, "pair": [2, "b"], "shapes": [{"shape": "circle", "radius": 2}]})
    assert drawing.exponent == 28.0 and drawing.pair == (2, "b")
    assert drawing.shapes == [Circle(shape="circle", radius=2.0)]


def test_settings_import_without_heavy_libraries():
    code = (
        "import sys, data.config; print({'torch', 'datasets', 'pyarrow', 'sentencepiece', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "1" * 5000, "a whole number of 5000 digits, more than 64 bits hold; put it in quotes"),
        ("a: !!timestamp x", "the tag !!timestamp is not taken"),
        ("? [1]\n: 2", "a mapping, a list or an alias cannot be a key"),
        ("[" * 3000, "not valid YAML: it is nested too deeply"),
        ("&a [*a]", r"the alias \*a stands within what it names"),
    ],
)
def test_values_that_yaml_cannot_make_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{message}"):
        read_tree(tmp_path / "c.yaml")
