"""The embedded corpus: large, clean, without repetition, and the same in every process."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.config import EmbeddedSource
from data.sources import embedded as module
from data.sources.corpus import documents


@pytest.fixture(scope="module")
def embedded() -> list[str]:
    return list(documents(EmbeddedSource(kind="embedded")))


@pytest.mark.slow
def test_embedded_corpus_is_large_and_english(embedded):
    text = "\n".join(embedded)
    assert len(text.encode()) > 2_000_000
    assert len(embedded) > 400
    words = Counter(re.findall(r"[a-z]+", text.lower()))
    assert {"the", "is", "of", "to", "a", "and"} <= {word for word, _ in words.most_common(10)}


@pytest.mark.slow
def test_embedded_corpus_is_clean(embedded):
    for text in embedded:
        assert text.strip()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]|[ \t]\n|[ \t]\Z|\A\n|\n\Z", text), text[:80]


@pytest.mark.slow
def test_embedded_corpus_says_nothing_twice(embedded):
    assert len(set(embedded)) == len(embedded)
    inherited = "Return repr(self)."  # the docstring of hundreds of slots
    assert sum(text.split("\n\n").count(inherited) for text in embedded) == 1


@pytest.mark.slow
def test_embedded_corpus_is_the_same_in_another_process(embedded):
    code = (
        "import hashlib, sys; sys.excepthook = lambda *a: None; sys.excepthook.__doc__ = 'a hook of the program';"
        "from data.sources.embedded import embedded_texts as texts\n"
        "print(hashlib.sha256('\\0'.join(texts()).encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == hashlib.sha256("\0".join(embedded).encode()).hexdigest()
    assert found.stderr == ""


def test_docstrings_come_in_source_order(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        '"""one"""\nclass A:\n    """two"""\n    def f(self):\n        """three"""\n        "no"\n'
        'if True:\n    def g():\n        """four"""\n        async def h():\n            """five"""\nraise SystemExit\n'
    )
    assert [text for text in module._docstrings(file) if text] == ["one", "two", "three", "four", "five"]
