"""Agents that use the Python functions of their profile: real gateways and real processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.custom import Trust
from ownware_gateway.doctor import examine
from tests.custom import AUTO, Http, called, ends, gone, pids, write_tools, written
from tests.gateway import (
    Gateways,
    get_json,
    post_json,
    run_events,
    start_run,
    until_status,
)
from tests.provider import Call, Provider, Reply

MakeProfile = Callable[..., Path]

WEATHER = '''
    import asyncio
    from pathlib import Path

    from ownware_gateway.tool import tool
    from tools import _shared

    @tool(reads_only=True)
    def forecast(city: str, days: int = 1) -> dict:
        """Say how the weather will be.

        Args:
            city: Where.
        """
        print(f"asking for {city}")
        return {"city": city, "days": days, "sky": _shared.SKY}

    async def note(line: str) -> str:
        """Keep a line."""
        await asyncio.sleep(0)
        with Path("notes").open("a") as file:
            file.write(line + "\\n")
        return "kept"
'''


def offered(request: Any) -> dict[str, Any]:
    """The tools that a model was given, by name."""
    return {tool["function"]["name"]: tool["function"] for tool in request.body.get("tools", ())}


async def test_an_agent_calls_the_functions_of_its_profile(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", tools={"preset": "none"})
    write_tools(profile, weather=WEATHER, _shared='SKY = "grün"')
    up = await start_gateway(trust_profile=["assistant"])
    said = await called(http, up.url, provider, Call("forecast", {"city": "Bern"}))
    assert ends(said) == {"forecast": ('{"city":"Bern","days":1,"sky":"grün"}', False)}
    assert [e["progress"] for e in said if e["type"] == "tool.call.progress"] == ["asking for Bern"]
    tools = offered(provider.requests[0])
    assert set(tools) == {"forecast", "note"}
    assert tools["forecast"]["description"] == "Say how the weather will be."
    assert tools["forecast"]["parameters"]["properties"]["city"] == {
        "type": "string",
        "description": "Where.",
    }

    # What does not say that it only reads is asked about.
    provider.reply(Reply(calls=[Call("note", {"line": "x"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    assert not (up.workspace / "notes").exists()
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
    assert ends(await run_events(http, up.url, run["runId"])) == {"note": ("kept", False)}
    assert (up.workspace / "notes").read_text() == "x\n"


SIDE_EFFECT = '''
    from pathlib import Path
    Path({file!r}).write_text("imported")

    def work() -> str:
        """Work."""
        return "done"
'''


async def test_code_of_a_profile_that_is_not_trusted_is_never_run_and_that_is_said(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    profiles: Path,
    tmp_path: Path,
) -> None:
    # What it says of itself is not what the operator has named.
    code = {"work": SIDE_EFFECT.format(file=str(tmp_path / "ran"))}
    write_tools(make_profile("assistant", security=AUTO), **code)
    make_profile("good", security=AUTO).rename(profiles / "evil")
    write_tools(profiles / "evil", **code)
    up = await start_gateway(trust_profile=["good"])
    said = await called(http, up.url, provider, Call("work"))
    ((result, is_error),) = ends(said).values()
    assert is_error
    why = (
        "'work' in tools/ of the profile 'assistant' cannot be used: it is code, and the profile is"
        " not trusted. To trust it, start the gateway with --trust-profile assistant."
    )
    assert why in result
    assert [event["text"] for event in said if event.get("notice")] == [f"[{why}]\n\n"]
    assert why in str(provider.requests[0].body)
    assert "work" not in offered(provider.requests[0])
    assert said[-1]["status"] == "succeeded"
    await called(http, up.url, provider, Call("work"), profileId="good")
    listed = (await get_json(http, up.url, "/profiles"))["items"]
    assert {item["id"]: len(item["missing"]) for item in listed} == {"assistant": 1, "good": 1}
    found = [item.text for item in examine(up.data_dir, profiles, Trust()) if item.level == "warn"]
    assert why in found
    assert not (tmp_path / "ran").exists()

    await start_gateway.restart(up, trust_profiles=True)
    assert ends(await called(http, up.url, provider, Call("work"))) == {"work": ("done", False)}
    assert (tmp_path / "ran").exists()


async def test_trust_cannot_come_from_a_file_of_the_profile(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile
) -> None:
    attempts: list[dict[str, Any]] = [
        {"trusted": True},
        {"functions": {"x": []}},
        {"tools": {"custom": {"trusted": True}}},
    ]
    for index, fields in enumerate(attempts):
        make_profile(f"p{index}", **fields)
    up = await start_gateway()
    broken = (await get_json(http, up.url, "/profiles"))["broken"]
    assert len(broken) == 3


async def test_code_in_the_workspace_is_not_run_since_agents_could_have_written_it(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    profiles: Path,
    tmp_path: Path,
) -> None:
    code = SIDE_EFFECT.format(file=str(tmp_path / "ran"))
    write_tools(make_profile("assistant", security=AUTO), work=code)
    up = await start_gateway(trust_profiles=True, workspace=str(profiles))
    ((result, _),) = ends(await called(http, up.url, provider, Call("work"))).values()
    assert "the files lie in the workspace" in result
    await start_gateway.stop(up)
    # A link to there is no way around it.
    work = tmp_path / "work"
    (profiles / "assistant" / "tools").rename(work)
    (profiles / "assistant" / "tools").symlink_to(work)
    up = await start_gateway(trust_profiles=True, workspace=str(work))
    ((result, _),) = ends(await called(http, up.url, provider, Call("work"))).values()
    assert "the files lie in the workspace" in result
    assert not (tmp_path / "ran").exists()


async def test_an_answer_holds_for_the_very_code_that_it_was_given_for(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    profile = make_profile("assistant", tools={"preset": "none"})
    code = 'def work() -> str:\n    """Work."""\n    return {!r}\n'
    write_tools(profile, work=code.format("one"))
    up = await start_gateway(trust_profiles=True)
    for change, expected in (
        (None, ("one", False)),
        ("two", ("work is not what it was when a person was asked.", True)),
    ):
        provider.reply(Reply(calls=[Call("work")]), Reply(text=["done"]))
        run = await start_run(http, up.url, "go")
        await until_status(http, up.url, run, "waiting")
        if change is not None:
            write_tools(profile, work=code.format(change))
        await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
        assert ends(await run_events(http, up.url, run["runId"])) == {"work": expected}
    # Asked anew it is the new code.
    provider.reply(Reply(calls=[Call("work")]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
    assert ends(await run_events(http, up.url, run["runId"])) == {"work": ("two", False)}


async def test_a_tool_has_the_variables_that_its_profile_names_and_no_others(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret, other = "weather-" + "of-tomorrow", "not-" + "for-tools"
    monkeypatch.setenv("WEATHER_KEY", secret)
    monkeypatch.setenv("OTHER_KEY", other)
    env = {"WEATHER_TOKEN": "${env:WEATHER_KEY}", "PLAIN": "a value"}
    profile = make_profile(
        "assistant", tools={"preset": "none", "custom": {"env": env}}, security=AUTO
    )
    show = '''
        import os, sys

        def show() -> dict:
            """Show the environment."""
            print(os.environ["WEATHER_TOKEN"])
            return {**os.environ, "length": len(os.environ["WEATHER_TOKEN"]), "argv": sys.argv}
    '''
    write_tools(profile, show=show)
    up = await start_gateway(trust_profiles=True, tool_env=["OTHER_KEY"])
    said = await called(http, up.url, provider, Call("show"))
    ((result, is_error),) = ends(said).values()
    assert not is_error
    assert f'"length":{len(secret)}' in result
    assert '"PLAIN":"a value"' in result
    everything = str(said) + str([item.body for item in provider.requests])
    assert secret not in everything
    assert other not in everything
    assert "OTHER_KEY" not in everything
    assert "OPENAI_API_KEY" not in everything
    (shown,) = (await get_json(http, up.url, "/profiles"))["items"]
    assert shown["tools"]["custom"]["env"] == {**env, "PLAIN": "[secret]"}

    monkeypatch.delenv("WEATHER_KEY")
    ((result, _),) = ends(await called(http, up.url, provider, Call("show"))).values()
    assert "need variables that the gateway does not have: WEATHER_KEY" in result


async def test_a_secret_that_is_cut_off_in_what_a_tool_says_is_not_seen_in_part(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WEATHER_TOKEN", "weather-" + "of-tomorrow")
    custom = {"env": {"WEATHER_TOKEN": "${env:WEATHER_TOKEN}"}}
    tools = {"preset": "none", "custom": custom}
    profile = make_profile("assistant", tools=tools, security=AUTO)
    show = '''
        import os

        def show() -> str:
            """Show the token where there is no room for all of it."""
            print("x" * 190 + os.environ["WEATHER_TOKEN"])
            return "x" * 65_526 + os.environ["WEATHER_TOKEN"]
    '''
    write_tools(profile, show=show)
    up = await start_gateway(trust_profiles=True)
    said = await called(http, up.url, provider, Call("show"))
    (line,) = (event["progress"] for event in said if event["type"] == "tool.call.progress")
    assert line == "x" * 190 + "[secret]…"
    assert "x[secret]" in ends(said)["show"][0]
    assert "of-tomorrow" not in str(said)


async def test_sixteen_calls_at_once_are_sixteen_processes(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    meet = '''
        import os, time
        from pathlib import Path

        def meet(number: int) -> int:
            """Wait until all the others are there too."""
            Path(f"here.{number}").write_text(str(os.getpid()))
            while len(list(Path().glob("here.*"))) < 16:
                time.sleep(0.01)
            return os.getpid()
    '''
    write_tools(make_profile("assistant", tools={"preset": "none"}, security=AUTO), meet=meet)
    up = await start_gateway(trust_profiles=True)
    said = await called(
        http, up.url, provider, *(Call("meet", {"number": number}) for number in range(16))
    )
    results = {event["result"] for event in said if event["type"] == "tool.call.end"}
    assert results == {path.read_text() for path in up.workspace.glob("here.*")}
    assert len(results) == 16


async def test_a_cancelled_run_leaves_nothing_of_its_call(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    tmp_path: Path,
) -> None:
    hang = f'''
        import os, signal, subprocess, sys, time

        def hang() -> str:
            """Hang, with a child that has left the session."""
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
            )
            with open({str(tmp_path / "pids")!r}, "a") as file:
                file.write(f"{{os.getpid()}}\\n{{child.pid}}\\n")
            print("hanging")
            time.sleep(600)
            return ""
    '''
    write_tools(make_profile("assistant", tools={"preset": "none"}, security=AUTO), hang=hang)
    up = await start_gateway(trust_profiles=True)
    provider.reply(Reply(calls=[Call("hang")]))
    run = await start_run(http, up.url, "go")
    await written(tmp_path / "pids", 2)
    await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
    await until_status(http, up.url, run, "cancelled")
    await gone(tmp_path / "pids", 2)
    assert os.getpid() not in pids(tmp_path / "pids")
