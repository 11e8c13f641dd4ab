"""The gateway's own servers: the files that name them, and the routes that show and change them."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ownware_gateway.errors import BootError
from tests.gateway import Gateways, get_json, post_json, start_run, until_status
from tests.log import until
from tests.mcp import gone, local, pids
from tests.mcp.test_runs import AUTO, MakeProfile, calls, offered
from tests.provider import Call, Provider

Http = aiohttp.ClientSession
WriteConfig = Callable[..., Path]


@pytest.fixture
def config(tmp_path: Path) -> WriteConfig:
    """`config(name=settings)` writes the file of servers in the data directory."""

    def write(**servers: dict[str, Any]) -> Path:
        path = tmp_path / "data" / "mcp.json"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(json.dumps({"mcpServers": servers, "theirs": 1}))
        return path

    return write


async def send(http: Http, method: str, url: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with http.request(method, f"{url}/api/v1/mcp{path}", json=body) as response:
        return response.status, await response.json() if response.status != 204 else None


async def test_the_gateways_servers_are_for_profiles_that_name_them_or_have_every_tool(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    config: WriteConfig,
    tmp_path: Path,
) -> None:
    config(one=local("--pids", str(tmp_path / "one")))
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"mcpServers": {"two": local("--pids", str(tmp_path / "two"))}}))
    make_profile("none", tools={"preset": "coding"}, security=AUTO)
    named = {"preset": "none", "allow": ["one__echo", "read_file"]}
    make_profile("named", tools=named, security=AUTO)
    make_profile("full", tools={"preset": "full", "deny": ["two__*", "one__die"]}, security=AUTO)
    make_profile(
        "listed",
        tools={"preset": "none", "allow": ["two__*"]},
        security={"permissionMode": "allowlist"},
    )
    up = await start_gateway(mcp_config=str(more))
    assert up.profiles.broken() == []
    has: dict[str, set[str]] = {}
    for profile in ("none", "named", "full", "listed"):
        (end,) = await calls(
            http, up.url, provider, Call("two__echo", {"text": "x"}), profileId=profile
        )
        assert end == (("x", False) if profile == "listed" else (end[0], True))
        has[profile] = {
            name for name in offered(provider.requests[-1]) if "__" in name or name == "read_file"
        }
        if profile == "none":
            assert not (tmp_path / "one").exists()
        if profile == "full":
            assert not (tmp_path / "two").exists()
    assert has["none"] == {"read_file"}
    assert has["named"] == {"one__echo", "read_file"}
    assert {"one__echo", "one__append"} <= has["full"]
    assert not {"one__die", "two__echo"} & has["full"]
    assert "two__append" in has["listed"]
    assert len(pids(tmp_path / "one")) == len(pids(tmp_path / "two")) == 1


async def test_a_file_that_changes_is_read_again_and_one_that_is_wrong_changes_nothing(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    config: WriteConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_profile("assistant", tools={"preset": "full"}, security=AUTO)
    file = config(t=local("--pids", str(tmp_path / "first")))
    up = await start_gateway()
    echo = Call("t__echo", {"text": "x"})
    assert await calls(http, up.url, provider, echo) == [("x", False)]
    file.write_text("{")
    assert await calls(http, up.url, provider, echo) == [("x", False)]
    (said,) = (item.message for item in caplog.records if "mcp.json" in item.message)
    assert "is not JSON at line 1. What it said before still holds." in said
    config(t=local("--pids", str(tmp_path / "second")))
    assert await calls(http, up.url, provider, echo) == [("x", False)]
    assert len(pids(tmp_path / "second")) == 1
    await gone(tmp_path / "first")
    config()
    ((said, is_error),) = await calls(http, up.url, provider, echo)
    assert is_error
    assert "There is no tool named 't__echo'" in said
    await gone(tmp_path / "second")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("{", "is not JSON at line 1", id="no JSON"),
        pytest.param("[]", "must hold", id="no object"),
        pytest.param('{"mcpServers": {"a__b": {"command": "x"}}}', "a__b", id="a name like ours"),
        pytest.param(
            '{"mcpServers": {"a": {"comand": "x"}}}', "did you mean 'command'?", id="misspelt"
        ),
        pytest.param(
            '{"mcpServers": {"a": {"env": {"KEY": "hush-hush"}}}}', "has a 'command'", id="neither"
        ),
        pytest.param(
            '{"mcpServers": {"a": {"url": "https://a", "headers": "hush-hush"}}}',
            "'mcpServers.a.headers' is of another kind",
            id="headers that are none",
        ),
    ],
)
async def test_a_file_that_is_wrong_stops_the_start_and_shows_no_secret(
    text: str, said: str, start_gateway: Gateways, config: WriteConfig
) -> None:
    config().write_text(text)
    with pytest.raises(BootError) as caught:
        await start_gateway()
    assert said in str(caught.value)
    assert "hush-hush" not in str(caught.value)


async def test_a_profile_that_names_a_server_that_there_is_not_is_refused(
    start_gateway: Gateways, make_profile: MakeProfile, config: WriteConfig
) -> None:
    config(clock=local())
    make_profile("a", tools={"deny": ["clok__*"]})
    make_profile(
        "b", tools={"allow": ["clock__*", "clock__now", "own__x"], "mcp": {"own": local()}}
    )
    up = await start_gateway()
    (broken,) = up.profiles.broken()
    assert broken.message == (
        "a: The field 'tools.deny' names no tool with 'clok__*'; "
        "no MCP server or service is named 'clok', did you mean 'clock'?"
    )


async def test_the_lists_tell_running_servers_from_those_that_could_run(
    start_gateway: Gateways, http: Http, config: WriteConfig, make_profile: MakeProfile
) -> None:
    config(
        on=local(trusted=True, description="On."),
        off=local("x", enabled=False, env={"K": "${env:NO_SUCH_VARIABLE}"}),
    )
    make_profile("assistant", tools={"preset": "full", "mcp": {"own": local("--die")}})
    up = await start_gateway()

    async def ids(path: str) -> list[str]:
        return [item["id"] for item in await get_json(http, up.url, f"/mcp/servers{path}")]

    assert await ids("") == []
    assert await ids("/config") == ["on"]
    assert await ids("/catalog") == ["off"]
    await until_status(http, up.url, await start_run(http, up.url, "go"), "succeeded")
    assert await ids("/available") == ["on", "off", "assistant:own"]

    shown: list[dict[str, Any]] = []

    async def has_died() -> bool:
        # It is started again and again, each time with nothing said so far.
        shown[:] = await get_json(http, up.url, "/mcp/servers")
        return len(shown[1]["stderr"]) == 2 and shown[1]["state"] != "starting"

    await until(has_died)
    on, own = shown
    assert (on["isRunning"], on["isConfig"], on["state"]) == (True, True, "ready")
    assert on["stderr"] == ["the server is here"]
    echo = on["tools"][0]
    assert (echo["name"], echo["serverName"]) == ("on__echo", "echo")
    assert echo["annotations"]["readOnlyHint"] is True
    assert (own["isRunning"], own["profileId"]) == (False, "assistant")
    assert own["error"] == "it ended with exit code 7"
    assert own["stderr"] == ["the server is here", "and cannot go on"]
    off = await get_json(http, up.url, "/mcp/servers/off")
    assert (off["state"], off["isAvailable"]) == ("stopped", False)
    assert off["requiredEnvVars"] == ["NO_SUCH_VARIABLE"]
    status, answer = await send(http, "GET", up.url, "/servers/nobody")
    assert (status, answer["error"]) == (404, "not_found")


async def test_a_server_of_the_catalogue_runs_while_it_is_enabled(
    start_gateway: Gateways, http: Http, config: WriteConfig, tmp_path: Path
) -> None:
    config(clock=local("--pids", str(tmp_path / "pids"), enabled=False))
    up = await start_gateway()
    for _ in range(2):
        status, shown = await send(http, "POST", up.url, "/servers/catalog/clock/enable")
        assert (status, shown["state"], shown["enabled"]) == (201, "ready", True)
    assert len(pids(tmp_path / "pids")) == 1
    assert (await send(http, "DELETE", up.url, "/servers/catalog/clock/disable"))[0] == 204
    await gone(tmp_path / "pids", 0.1)
    assert (await send(http, "DELETE", up.url, "/servers/catalog/clock/disable"))[0] == 404
    status, answer = await send(http, "POST", up.url, "/servers/catalog/none/enable")
    assert status == 404
    assert "there are: clock" in answer["message"]


async def test_a_server_can_be_added_changed_and_removed_while_the_gateway_runs(
    start_gateway: Gateways, http: Http, config: WriteConfig, tmp_path: Path
) -> None:
    config(fixed=local())
    up = await start_gateway(mcp_add=True)
    body = {"name": "new", **local("--pids", str(tmp_path / "first"))}
    status, shown = await send(http, "POST", up.url, "/servers", body)
    assert (status, shown["state"], shown["source"]) == (201, "ready", "api")
    status, answer = await send(http, "POST", up.url, "/servers", body)
    assert (status, answer["error"]) == (409, "server_exists")
    for wrong, said in (
        ({"name": "other"}, "has a 'command'"),
        ({"command": "x"}, "'name' is required"),
        ({"name": "other", "comand": "x"}, "did you mean 'command'?"),
    ):
        status, answer = await send(http, "POST", up.url, "/servers", wrong)
        assert status == 400
        assert said in answer["message"]
    assert (await send(http, "PUT", up.url, "/servers/nobody", local()))[0] == 404
    changed = {"id": "new", **local("--pids", str(tmp_path / "second"))}
    status, shown = await send(http, "PUT", up.url, "/servers/new", changed)
    assert (status, shown["state"]) == (200, "ready")
    await gone(tmp_path / "first", 0.1)
    assert (await send(http, "PUT", up.url, "/servers/new", {"id": "x", **local()}))[0] == 400
    assert (await send(http, "PUT", up.url, "/servers/fixed", local()))[0] == 409
    assert (await send(http, "DELETE", up.url, "/servers/fixed"))[0] == 409
    assert (await send(http, "DELETE", up.url, "/servers/new"))[0] == 204
    await gone(tmp_path / "second", 0.1)
    assert (await send(http, "DELETE", up.url, "/servers/new"))[0] == 404


async def test_a_tool_can_be_called_outside_of_runs(
    start_gateway: Gateways, http: Http, config: WriteConfig
) -> None:
    config(t=local(callTimeout="300ms"), bad=local("--die"), off=local(enabled=False))
    up = await start_gateway()

    async def call(path: str, **arguments: Any) -> tuple[int, Any]:
        return await post_json(http, up.url, f"/mcp/proxy/{path}", {"arguments": arguments})

    well = {"success": True, "result": "x", "error": None, "isError": False, "is_error": False}
    assert await call("t/tools/echo", text="x") == (200, well)
    assert await call("t/tools/t__echo", text="x") == (200, well)
    status, answer = await call("t/tools/fail")
    assert (status, answer["success"], answer["error"]) == (200, False, "it did not work")
    status, answer = await call("t/tools/hang")
    assert (status, answer["success"], answer["result"]) == (200, False, None)
    assert "did not answer" in answer["error"]
    status, answer = await call("bad/tools/echo")
    assert (status, answer["success"]) == (200, False)
    assert "ended with exit code 7" in answer["error"]
    assert (await call("t/tools/nothing"))[0] == 404
    assert (await call("off/tools/echo"))[0] == 404


async def test_runs_that_begin_together_start_a_server_once(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    config: WriteConfig,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    config(t=local("--pids", str(tmp_path / "pids")))
    make_profile("assistant", tools={"preset": "full"})
    up = await start_gateway()
    runs = await asyncio.gather(*(start_run(http, up.url, "go") for _ in range(8)))
    for run in runs:
        await until_status(http, up.url, run, "succeeded")
    assert len(pids(tmp_path / "pids")) == 1
    assert all("t__echo" in offered(asked) for asked in provider.requests)
