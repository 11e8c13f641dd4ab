"""The clients and a real model, with nothing scripted in between: what it says is left to it."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.test_clients import HERE, node_modules, output, python_of, talk
from tests.gateway import Gateways

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", ["openai", "langchain-openai", "litellm", "node", "curl"])
async def test_a_client_talks_to_a_real_model(
    start_gateway: Gateways, make_profile: Callable[..., Path], llama_server: str, name: str
) -> None:
    make_profile(
        "brief", model="local:gemma", temperature=0, maxTokens=24, tools={"preset": "none"}
    )
    up = await start_gateway(local_base_url=f"{llama_server}/v1")
    if name == "curl":
        body = {"model": "brief", "messages": [{"role": "user", "content": "Count to ten."}]}
        url = f"{up.url}/v1/chat/completions"
        said = json.loads(await output(up.url, "curl", "-sS", url, "-d", json.dumps(body)))
        assert said["choices"][0]["message"]["content"]
        return
    if name == "node":
        place = await asyncio.to_thread(node_modules)
        command = [shutil.which("node") or "node", str(place / "real.mjs")]
    else:
        python = await asyncio.to_thread(python_of, name)
        script = f"real_{name.partition('-')[0]}.py"
        command = [python, str(HERE / "scripts" / script)]
    assert await talk(up.url, *command)
