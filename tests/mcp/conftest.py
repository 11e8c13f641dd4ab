"""Servers that fail do it often here: the pauses that spare a machine are short."""

import pytest


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ownware_gateway.mcp.keeper.RESTART_S", 0.05)
    monkeypatch.setattr("ownware_gateway.mcp.child.EXIT_GRACE_S", 0.2)
    monkeypatch.setattr("ownware_gateway.mcp.child.TERM_GRACE_S", 0.2)
