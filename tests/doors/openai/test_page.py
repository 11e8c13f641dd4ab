"""The commands of docs/openai.md, as they would be pasted."""

import os
import re
from pathlib import Path

import aiohttp

from tests.gateway import Gateways, get_json
from tests.test_docs import ROOT, run_shell


async def test_the_commands_of_the_page_work(
    start_gateway: Gateways, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    up = await start_gateway(
        profiles=str(ROOT / "profiles"), openai_api_key="", ollama_host="127.0.0.1:9"
    )
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    said = ""
    for block in blocks:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        wrote, _ = await run_shell(block.replace("http://localhost:3011", up.url), environment)
        assert '"error":' not in wrote
        said += wrote
    assert "offline model" in said
    assert "Your name is Alice." in said
    assert (await get_json(http, up.url, "/runs?status=failed"))["items"] == []
