"""A service that FastAPI describes: its names, its models, its log-in form."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import Gateways, get_json
from tests.mcp.test_runs import AUTO, calls, offered
from tests.provider import Call, Provider

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

PASSWORD = "fast-" + "and-secret"

APP = """
import sys
from typing import Annotated
import fastapi, uvicorn
from fastapi import Body, Depends, Form, Header, Query
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel

app = fastapi.FastAPI()
token = OAuth2PasswordBearer(tokenUrl="token")

class Part(BaseModel):
    name: str
    size: int | None = None
    parts: list["Part"] = []

@app.post("/token")
def log_in(username: Annotated[str, Form()], password: Annotated[str, Form()]):
    if password != sys.argv[2]:
        raise fastapi.HTTPException(400, "no")
    return {"access_token": "token-for-" + username, "token_type": "bearer"}

@app.get("/parts/{part_id}")
def get_part(
    part_id: int, tag: Annotated[list[str], Query()] = [], x_shop: Annotated[str, Header()] = ""
):
    return {"id": part_id, "tag": tag}

@app.put("/parts/{part_id}")
def put_part(part_id: int, part: Part, by: Annotated[str, Depends(token)]):
    return {"id": part_id, "part": part, "by": by}

@app.post("/both")
def both(part: Part, note: Annotated[str, Body()]):
    return {"part": part, "note": note}

@app.post("/upload")
def upload(title: Annotated[str, Form()], file: fastapi.UploadFile):
    return title

@app.get("/healthz")
def healthz():
    return "well"

uvicorn.run(app, host="127.0.0.1", fd=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    """Where the service answers: a process of its own on a socket that is open already."""
    program = tmp_path / "service.py"
    program.write_text(APP)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(program),
            str(listener.fileno()),
            PASSWORD,
            pass_fds=[listener.fileno()],
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            await process.wait()


async def test_an_agent_calls_a_service_that_fastapi_describes(
    url: str,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)
    service: dict[str, Any] = {
        "spec": f"{url}/openapi.json",
        "allowPrivate": True,
        "exclude": ["log_in*"],
        "auth": {
            "path": "/token",
            "headers": {"Content-Type": "application/x-www-form-urlencoded"},
            "body": {"username": "me", "password": "${env:SHOP_PASSWORD}"},
            "take": {"path": "access_token"},
        },
    }
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("s__get_part_parts__part_id__get", {"part_id": 7, "tag": ["a", "b&c"]}),
        Call("s__put_part_parts__part_id__put", {"part_id": 7, "name": "x", "parts": []}),
        Call("s__both_both_post", {"part": {"name": "x"}, "note": "n"}),
        Call("s__get_part_parts__part_id__get", {"part_id": "x"}),
    )
    assert offered(provider.requests[0]) == {
        "s__get_part_parts__part_id__get",
        "s__put_part_parts__part_id__put",
        "s__both_both_post",
    }
    assert said[0] == ('{"id":7,"tag":["a","b&c"]}', False)
    put, is_error = said[1]
    assert not is_error
    assert json.loads(put)["part"] == {"name": "x", "size": None, "parts": []}
    assert json.loads(put)["by"] == "[secret]"
    assert not said[2][1]
    assert said[3][1]
    assert "HTTP 422 from GET /parts/{part_id}" in said[3][0]
    (shown,) = (await get_json(http, up.url, "/services"))["services"]
    assert len(shown["leftOut"]) == 1
    assert "its body wants a file, 'file'" in shown["leftOut"][0]
