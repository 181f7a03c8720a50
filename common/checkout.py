"""Where this house's code is, for processes that start in another folder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> dict[str, str]:
    """What Python needs in its environment to run the checkout from the working directory; nothing if they are one.

    DeepSpeed's launcher hands variables on to other hosts whose names begin with PYTHON.
    """
    if Path.cwd() == ROOT:
        return {}
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(ROOT), *filter(None, given)])
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}  # no data/ of the user's before ours
