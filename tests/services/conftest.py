"""The service of these tests."""

from collections.abc import AsyncIterator

import pytest

from tests.services.shop import Shop


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    """A service on loopback that describes itself; see `Shop`."""
    async with Shop() as up:
        yield up
