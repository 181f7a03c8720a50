"""A pytest plugin that writes each test's outcome down as it comes, one JSON line each, into the file that the
environment names.
"""

from __future__ import annotations

import os

import pytest

from common.strict_json import to_json

VARIABLE = "OVERTONE_TALLY"


class Tally:
    """Appends to the file at `path`, a line at a time: what is there is whole but for the last one."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest's hook for each phase of a test."""
        if report.when == "call" or report.outcome != "passed":  # of set-up and clearing away, what went wrong
            self._write(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """pytest's hook for each file: one that cannot be imported failed."""
        if report.outcome == "failed":
            self._write(report.nodeid, "failed")

    def _write(self, name: str, outcome: str) -> None:
        self._file.write(to_json([name, outcome]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """pytest's hook at its start; without the variable nothing is written."""
    path = os.environ.get(VARIABLE)
    if path and not hasattr(config, "workerinput"):  # the workers' reports come to the controller
        config.pluginmanager.register(Tally(path))
