"""What the machine that runs the tests cannot show is skipped, and says so."""

from __future__ import annotations

import pytest
from hypothesis import settings

from engines.saturation import products_saturate

settings.register_profile("any machine", deadline=None)  # a busy machine's pauses are no failures
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("exact_products") is not None]
    if marked and products_saturate():
        reason = "uint8 x int8 products saturate on this CPU (it has no VNNI), so its figures are not the formula's"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
