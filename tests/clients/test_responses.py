"""The Responses API as clients and the specification's own types see it."""

import asyncio

import pytest

from tests.clients.test_clients import GOLDEN, HERE, python_of, scripted, talk
from tests.gateway import Gateways
from tests.provider import Provider

__all__ = ["scripted"]

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("lock", "script"),
    [("openai", "openai_responses.py"), ("openresponses-types", "openresponses.py")],
)
async def test_responses_are_what_others_say_they_are(
    start_gateway: Gateways, scripted: Provider, lock: str, script: str
) -> None:
    python = await asyncio.to_thread(python_of, lock)
    up = await start_gateway()
    said = await talk(up.url, python, str(HERE / "scripts" / script), str(GOLDEN))
    assert said.startswith(lock)
