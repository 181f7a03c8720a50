"""Marks for tests that need hosts of their own (benchmarks/hosts/network.py)."""

from __future__ import annotations

import pytest

from benchmarks.hosts.network import why_not

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
