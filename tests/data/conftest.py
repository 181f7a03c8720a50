"""The corpus that tests of preparation share, raw and prepared."""

from pathlib import Path

import pytest

from data.prepare import prepare
from tests.support.corpus import TEXTS, config, quiet, write_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder prepared once, to be copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder / "corpus.jsonl", TEXTS)
    prepare(config(folder), quiet)
    return folder
