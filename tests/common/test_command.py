"""What all commands share."""

from __future__ import annotations

import gc

import pytest

from common import command


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_torch_is_imported_and_what_it_made_is_never_looked_through(enabled) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with command.importing():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= frozen + len(made)
        assert not any(one is made for one in gc.get_objects()), "a collection does not come by"
        with pytest.raises(ImportError), command.importing():
            raise ImportError("no torch")
        assert gc.isenabled() == enabled, "nor does a failed import end collections"
    finally:
        (gc.enable if before else gc.disable)()
