"""Local folders as `hub` sources: the layout of a dataset, what save_to_disk wrote, and remedies that help there."""

from pathlib import Path

import datasets  # type: ignore[import-untyped]
import pytest

from common.errors import ConfigError
from data.config import HubSource
from data.reuse import differences
from data.sources.corpus import documents
from tests.data.sources.test_corpus import TEXTS
from tests.support.source_files import files, write_parquet


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", text=TEXTS[:3])
    write_parquet(folder / "train-00001-of-00002.parquet", text=TEXTS[3:])
    return folder


def hub(folder: object, **settings: str | bool) -> HubSource:
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


def test_what_helps_with_a_local_folder_does_not_name_the_hub(tmp_path):
    with pytest.raises(ConfigError) as caught:
        list(documents(hub(tmp_path)))
    (tmp_path / "notes.xyz").write_text("x")
    with pytest.raises(ConfigError) as other:
        list(documents(hub(tmp_path)))
    for told in (str(caught.value), str(other.value)):
        assert "data.source.kind=files" in told and ".parquet" in told
        assert not any(word in told for word in ("revision", "network", "HF_", "Hub"))


# ---- what save_to_disk wrote


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    texts = datasets.Dataset.from_dict({"text": [*TEXTS, None], "n": range(5)})
    texts.save_to_disk(tmp_path / "one", num_shards=2)
    texts.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": texts, "test": texts.select([1, 2])}).save_to_disk(tmp_path / "dict")
    return tmp_path


def test_a_saved_dataset_is_read_as_a_folder_and_as_files(saved):
    assert list(documents(hub(saved / "one"))) == TEXTS
    assert sorted(documents(hub(saved / "shuffled"))) == sorted(TEXTS)
    assert list(documents(hub(saved / "dict", split="test"))) == TEXTS[1:3]
    assert list(documents(files(saved / "one" / "data-00000-of-00002.arrow", saved / "one" / "*.arrow"))) == TEXTS


def test_what_a_saved_dataset_does_not_have_is_told(saved):
    with pytest.raises(ConfigError, match="no split 'val'; set data.source.split to one of train, test"):
        list(documents(hub(saved / "dict", split="val")))
    with pytest.raises(ConfigError, match="'n' is int64, not a string"):
        list(documents(hub(saved / "one", text_field="n")))
    with pytest.raises(ConfigError, match=r"data\.source\.subset: .*leave it out"):
        list(documents(hub(saved / "one", subset="plain")))
    (saved / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00002\.arrow: missing, but .*state\.json names it"):
        list(documents(hub(saved / "one")))
    (saved / "one" / "state.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"state\.json: not as save_to_disk writes it"):
        list(documents(hub(saved / "one")))


# ---- the first part of a dataset


def test_the_first_part_of_a_dataset_is_taken_only_if_asked_for(tmp_path):
    partial = tmp_path / "plain_text" / "partial-train"
    partial.mkdir(parents=True)
    write_parquet(partial / "0000.parquet", text=["of the first 5 GB"])
    for name in (tmp_path, partial):
        with pytest.raises(ConfigError, match=r"0000\.parquet: by its folder's name only .*data.source.partial=true"):
            list(documents(hub(name)))
        assert list(documents(hub(name, partial=True))) == ["of the first 5 GB"]
    with pytest.raises(ConfigError, match=r"0000\.parquet: by its folder's name only .*name its folder there"):
        list(documents(files(tmp_path / "**" / "*.parquet")))
    assert list(documents(files(partial / "*.parquet"))) == ["of the first 5 GB"]


def test_a_folder_above_the_dataset_may_have_any_name(tmp_path):
    folder = tmp_path / "partial-copies" / "mine"
    folder.mkdir(parents=True)
    write_parquet(folder / "train.parquet", text=TEXTS)
    assert list(documents(hub(folder))) == TEXTS


def test_data_that_were_prepared_before_that_setting_are_still_found(tmp_path):
    assert list(differences({"source": {"kind": "hub"}}, {"source": {"kind": "hub", "partial": False}})) == []
    assert list(differences({"source": {"kind": "hub"}}, {"source": {"kind": "hub", "partial": True}}))
