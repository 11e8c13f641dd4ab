"""What all tests of the OpenAI door want."""

import pytest

from ownware_gateway import app


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that stops does not wait for models that hang."""
    monkeypatch.setattr(app, "GRACE_S", 0.1)
