"""Local folders as `hub` sources: the layout of a dataset, what save_to_disk wrote, and remedies that help there."""

from pathlib import Path

import pytest

from data.config import HubSource
from data.corpus import documents
from data.settings import ConfigError
from tests.data.test_corpus import TEXTS, write_parquet


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", text=TEXTS[:3])
    write_parquet(folder / "train-00001-of-00002.parquet", text=TEXTS[3:])
    return folder


def hub(folder: object, **settings: str) -> HubSource:
    return HubSource(kind="hub", name=str(folder), **settings)  # type: ignore[arg-type]


def test_hub_streams_in_order(dataset):
    assert list(documents(hub(dataset))) == TEXTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "no split 'test'; set data.source.split to one of train"),
        ({"text_field": "body"}, "no column 'body'; set data.source.text_field to one of text"),
    ],
)
def test_hub_with_wrong_names(dataset, settings, message):
    with pytest.raises(ConfigError, match=message):
        list(documents(hub(dataset, **settings)))


def test_hub_with_a_damaged_file(dataset):
    (dataset / "train-00001-of-00002.parquet").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="train-00001-of-00002.parquet: unreadable after row 0"):
        list(documents(hub(dataset)))


def test_hub_runs_no_script(dataset):
    (dataset / "dataset.py").write_text(f"open({str(dataset / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(documents(hub(dataset)))
    assert not (dataset / "ran").exists()


def test_hub_with_files_of_another_type(tmp_path):
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(ConfigError, match=r"train\.csv: cannot read this type of file; expected one of .*\.arrow\.$"):
        list(documents(hub(tmp_path)))


def test_hub_with_subsets(tmp_path):
    for subset in ("plain", "other"):
        (tmp_path / subset).mkdir()
        write_parquet(tmp_path / subset / "train-00000.parquet", text=[f"of {subset}"])
    names = "".join(f"- config_name: {s}\n  data_files: {s}/train-*.parquet\n" for s in ("plain", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    assert list(documents(hub(tmp_path, subset="plain"))) == ["of plain"]
    assert list(documents(hub(tmp_path, subset="other"))) == ["of other"]
    with pytest.raises(ConfigError, match=r"\['plain', 'other'\].*; set data.source.subset to one of them$"):
        list(documents(hub(tmp_path)))


def test_hub_folder_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        list(documents(hub(tmp_path / "none")))
