"""What tools give back beside a short text: kept whole, shown to people and models, and let go."""

import asyncio
import base64
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import tools as limits
from ownware_gateway.app import Gateway
from ownware_gateway.client import Client
from ownware_gateway.conversation import IMAGES_GONE
from ownware_gateway.events import ImagePart, ResourcePart, ToolCallEnd, ValuePart
from ownware_gateway.images import IMAGE_BYTES_MAX
from ownware_gateway.log import Retention
from ownware_gateway.masking import MASK, Masker
from ownware_gateway.outputs import Settled, settle
from ownware_gateway.terminal import Terminal
from ownware_gateway.tools import Image, Output, Part, Resource, Value, clip
from ownware_gateway.transcript import IMAGES_BYTES_MAX, IMAGES_MAX, IMAGES_STEP
from tests.gateway import Gateways, get_json, post_json, run_events, start_run
from tests.mcp import local
from tests.mcp.server import DOT
from tests.pictures import png
from tests.provider import Asked, Call, Provider, Reply

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]
Events = list[dict[str, Any]]

AUTO: Final = {"permissionMode": "auto"}

#: Looks like a key, opens nothing.
KEY: Final = "sk-" + "k" * 40

LINES: Final = "".join(f"{number}\n" for number in range(1, 100_001))


def shell(command: str, call_id: str = "c1") -> Call:
    return Call("shell_execute", {"command": command}, call_id)


def read_on(**arguments: Any) -> Call:
    return Call("read_output", {"tool_call_id": "c1", **arguments})


def ends(said: Events) -> Events:
    return [event for event in said if event["type"] == "tool.call.end"]


@pytest.fixture
async def up(start_gateway: Gateways, make_profile: MakeProfile) -> Gateway:
    make_profile("assistant", security=AUTO)
    return await start_gateway()


async def run(
    http: Http, up: Gateway, provider: Provider, *calls: Call, **body: Any
) -> tuple[dict[str, Any], Events]:
    """Have the model make calls, one a turn; return the run and its events."""
    provider.reply(*(Reply(calls=[call]) for call in calls), Reply(text=["Done."]))
    started = await start_run(http, up.url, "go", **body)
    return started, await run_events(http, up.url, started["runId"])


async def get(http: Http, up: Gateway, thread_id: str, rest: str) -> tuple[Any, bytes]:
    """Return the answer for `outputs/…` of a thread, and its body."""
    path = f"{up.url}/api/v1/threads/{thread_id}/agents/root/outputs/{rest}"
    async with http.get(path) as response:
        return response, await response.read()


def private(up: Gateway) -> list[tuple[str, int]]:
    """The kinds of what is kept of outputs, with how much it is."""
    with closing(sqlite3.connect(up.data_dir / "gateway.db")) as database:
        rows = database.execute("SELECT kind, length(body) FROM private ORDER BY seq, kind")
        kinds = ("output", "image", "resource")
        return [(kind, size) for kind, size in rows if kind.startswith(kinds)]


# -- the whole text


async def test_an_output_that_is_cut_is_kept_and_read_on_in(
    up: Gateway, http: Http, provider: Provider
) -> None:
    started, said = await run(
        http,
        up,
        provider,
        shell("seq 100000"),
        read_on(offset=300_000, limit=12),
        read_on(contains="0123"),
        read_on(contains="0123", offset=500_000),
        read_on(offset=len(LINES)),
        Call("read_output", {"tool_call_id": "c2"}),
    )
    whole, page, found, later, past, unknown = ends(said)
    assert whole["outputBytesKept"] == len(LINES)
    note = '\n[read_output with tool_call_id "c1" shows the rest]'
    assert whole["result"].endswith(f"99999\n100000\n{note}")
    assert page["result"] == (
        f"{LINES[300_000:300_012]}[300000 to 300012 of {len(LINES)} characters are shown; "
        "go on with offset 300012]"
    )
    first = LINES.index("10123\n")
    assert found["result"].splitlines()[0] == f"{first}: 10123"
    assert len(found["result"].splitlines()) == 9
    assert later["result"].splitlines()[0] == f"{LINES.index('90123', 500_000)}: 90123"
    assert past["isError"]
    assert f"has {len(LINES)} characters" in past["result"]
    assert "Nothing is kept of a call 'c2'" in unknown["result"]
    assert all("outputBytesKept" not in end for end in (page, found, later))
    response, text = await get(http, up, started["threadId"], str(whole["seq"]))
    assert text.decode() == LINES
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Disposition"].startswith("attachment;")
    response, text = await get(http, up, started["threadId"], str(page["seq"]))
    assert text.decode() == page["result"]
    (_, reply) = await get_json(http, up.url, f"/threads/{started['threadId']}/messages")
    part = reply["parts"][0]
    assert (part["outputSeq"], part["outputBytesKept"]) == (whole["seq"], len(LINES))


async def test_an_output_of_an_earlier_run_is_read_on_in_after_a_restart_and_in_a_fork(
    up: Gateway, http: Http, provider: Provider, start_gateway: Gateways
) -> None:
    started, said = await run(http, up, provider, shell("seq 100000"))
    thread = started["threadId"]
    up = await start_gateway.restart(up)
    page = read_on(limit=4)
    _, again = await run(http, up, provider, page, threadId=thread)
    assert ends(again)[0]["result"].startswith("1\n2\n[0 to 4 of")
    status, fork = await post_json(
        http, up.url, f"/threads/{thread}/fork", {"atSeq": said[-1]["seq"]}
    )
    assert status == 201
    async with http.delete(f"{up.url}/api/v1/threads/{thread}") as response:
        assert response.status == 200
    _, forked = await run(http, up, provider, page, threadId=fork["id"])
    assert ends(forked)[0]["result"] == ends(again)[0]["result"]
    seq = ends(said)[0]["seq"]
    assert (await get(http, up, fork["id"], str(seq)))[1].decode() == LINES
    assert (await get(http, up, thread, str(seq)))[0].status == 410
    assert private(up) == [("output.00", len(LINES))]


async def test_another_threads_outputs_are_not_read(
    up: Gateway, http: Http, provider: Provider
) -> None:
    await run(http, up, provider, shell("seq 100000"))
    _, said = await run(http, up, provider, read_on())
    assert ends(said)[0]["isError"]


async def test_an_agent_without_the_tool_is_not_told_of_it(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, tools={"preset": "coding", "deny": ["read_output"]})
    up = await start_gateway()
    _, said = await run(http, up, provider, shell("seq 100000"))
    assert ends(said)[0]["outputBytesKept"] == len(LINES)
    assert "read_output" not in ends(said)[0]["result"]


@pytest.mark.parametrize("name", ["read_file", "shell_execute"])
async def test_a_secret_at_the_place_of_a_cut_leaves_no_part_of_it(
    name: str, up: Gateway, http: Http, provider: Provider
) -> None:
    # All places where the first cut of either tool could be, a key for each.
    text = "".join(f"{number:05d} {KEY}\n" for number in range(2_000))
    arguments = {"command": "cat a.txt"}
    if name == "read_file":
        text, arguments = text.replace("\n", " "), {"path": "a.txt"}
    for shift in (0, 13):
        (up.workspace / "a.txt").write_text("-" * shift + text)
        started, said = await run(http, up, provider, Call(name, arguments, f"c{shift}"))
        (end,) = ends(said)
        assert end["truncated"]
        assert "k" * 4 not in end["result"].replace("[read_output", "")
        assert "sk-" not in end["result"]
        assert MASK in end["result"]
        _, kept = await get(http, up, started["threadId"], str(end["seq"]))
        assert kept.decode() == ("-" * shift + text).replace(KEY, MASK)


async def test_of_an_endless_output_its_beginning_and_end_are_kept(
    up: Gateway, http: Http, provider: Provider
) -> None:
    pem = "-----BEGIN " + "PRIVATE KEY-----"
    command = f"echo first; yes word | head -c 12000000; echo {pem}; echo last"
    started, said = await run(http, up, provider, shell(command))
    (end,) = ends(said)
    assert limits.KEPT_BYTES_MAX * 0.99 < end["outputBytesKept"] <= limits.KEPT_BYTES_MAX
    assert f"[cut: {end['outputBytesRaw']} bytes in all" in end["result"]
    assert end["result"].count(MASK) == 1
    assert "of the" in end["result"].splitlines()[-1]
    _, kept = await get(http, up, started["threadId"], str(end["seq"]))
    assert kept.startswith(b"first\nword\n")
    assert b"bytes are not kept here]" in kept
    assert len(kept) == end["outputBytesKept"]


async def test_retention_takes_what_was_kept_with_its_event(
    up: Gateway, http: Http, provider: Provider
) -> None:
    (up.workspace / "a.png").write_bytes(png())
    read = Call("read_file", {"path": "a.png"}, "c2")
    started, said = await run(http, up, provider, shell("seq 100000"), read)
    assert [kind for kind, _ in private(up)] == ["output.00", "image.00"]
    while await up.log.prune(Retention(events_ms=-1_000)):
        pass
    assert private(up) == []
    response, body = await get(http, up, started["threadId"], str(ends(said)[0]["seq"]))
    assert (response.status, json.loads(body)["error"]) == (404, "output_not_found")


# -- parts


async def settled(*content: Part) -> Settled:
    return await settle(Output("text", content=content), Masker(), None)


async def test_parts_are_listed_for_clients_and_their_bytes_kept() -> None:
    image, pdf = png(), b"%PDF-1.7"
    found = await settled(
        Value({"token": "t", "said": KEY}),
        Image("image/whatever", image),
        Resource("report://a.pdf", "Application/PDF; x=y", pdf),
        Resource("urn:b", "not a type", f"the key is {KEY}"),
        Resource("urn:c", "application/json", f'"{KEY}"'.encode()),
        Resource("urn:link", "text/plain", size_bytes=7),
    )
    assert found.text == "text"
    assert found.content == [
        ValuePart(value={"token": MASK, "said": MASK}),
        ImagePart(mime_type="image/png", size_bytes=len(image), index=0),
        ResourcePart(uri="report://a.pdf", mime_type="application/pdf", size_bytes=8, index=1),
        ResourcePart(uri="urn:b", mime_type="application/octet-stream", size_bytes=19, index=2),
        ResourcePart(uri="urn:c", mime_type="application/json", size_bytes=10, index=3),
        ResourcePart(uri="urn:link", mime_type="text/plain", size_bytes=7),
    ]
    kept = [(fact.kind, fact.index, fact.body) for fact in found.private]
    assert kept == [
        ("image", 0, image),
        ("resource", 1, pdf),
        ("resource", 2, f"the key is {MASK}".encode()),
        ("resource", 3, f'"{MASK}"'.encode()),
    ]
    assert [file.data for file in found.images] == [image]


async def test_what_is_no_image_for_a_model_is_kept_for_people() -> None:
    found = await settled(Image("image/png", b"hello"), Image("image/tiff", b"II*\0"))
    assert found.text == (
        "text\n[images not shown: 2; PNG, JPEG, GIF and WebP can be, up to 3932160 bytes and "
        "8000 pixels a side]"
    )
    assert [part.kind for part in found.content or ()] == ["resource", "resource"]
    assert found.images == ()


async def test_parts_beyond_a_limit_are_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = Value("x" * (limits.VALUE_BYTES_MAX // 2))
    assert len((await settled(half, half)).content or ()) == 1
    found = await settled(*[Value(1)] * (limits.PARTS_MAX + 3))
    assert len(found.content or ()) == limits.PARTS_MAX
    assert found.text == "text\n[parts left out: 3; 16 are the most]"
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for part in (
        Value("x" * limits.VALUE_BYTES_MAX),
        Value(deep),
        Value({1, 2}),
        Resource("a", "text/plain", "x" * (limits.PART_BYTES_MAX + 1)),
        Resource("a", "", b"x" * (limits.PART_BYTES_MAX + 1)),
    ):
        found = await settled(part)
        assert found.content is None
        assert found.text.startswith("text\n[parts left out: 1; 4194304 bytes are the most, ")
    monkeypatch.setattr("ownware_gateway.outputs.PARTS_BYTES_MAX", 10)
    found = await settled(*[Resource("a", "", b"12345")] * 3)
    assert [fact.index for fact in found.private] == [0, 1]


async def test_a_long_text_is_masked_in_pieces_while_others_go_on() -> None:
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    counting = asyncio.ensure_future(count())
    whole = await settle(clip(f"{KEY} {'word ' * 400_000}{KEY}"), Masker(), "go on")
    counting.cancel()
    assert others > 20
    assert KEY not in whole.private[0].body.decode()
    assert whole.private[0].body.count(MASK.encode()) == 2
    assert whole.text.endswith("\n[go on]")


# -- images for models


def images_in(asked: Asked) -> list[str]:
    return [
        part["image_url"]["url"]
        for message in asked.body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def test_an_image_file_is_shown_to_the_model_before_and_after_a_restart(
    http: Http,
    provider: Provider,
    start_gateway: Gateways,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    (up.workspace / "a.png").write_bytes(png(5, 6))
    read = Call("read_file", {"path": "a.png"}, "c1")
    provider.reply(Reply(calls=[read]), Reply(hang=True), Reply(text=["A dot."]))
    started = await start_run(http, up.url, "look")
    _, before = await provider.requested(2)
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, started["runId"])
    _, _, after = await provider.requested(3)
    assert after.body == before.body
    (end,) = ends(said)
    size = len(png(5, 6))
    assert end["result"] == f"[image: a.png, image/png, 5×6 pixels, {size} bytes]"
    assert end["content"] == [
        {"kind": "image", "mimeType": "image/png", "sizeBytes": size, "index": 0}
    ]
    assert before.body["messages"][-2:] == [
        {"role": "tool", "tool_call_id": "c1", "content": end["result"]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[The images of read_file, call c1:]"},
                {"type": "image_url", "image_url": {"url": uri(png(5, 6))}},
            ],
        },
    ]
    # The next run has it from the log again, since no history with files is kept in memory.
    await run(http, up, provider, threadId=started["threadId"])
    assert (
        provider.requests[-1].body["messages"][: len(after.body["messages"])]
        == (after.body["messages"])
    )
    (_, reply, _, _) = await get_json(http, up.url, f"/threads/{started['threadId']}/messages")
    assert reply["parts"][0]["content"] == end["content"]


async def test_a_provider_that_has_a_place_for_images_gets_them_there(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO, model="anthropic:claude-sonnet-5-5")
    up = await start_gateway(anthropic_base_url=provider.url, anthropic_api_key=KEY)
    (up.workspace / "a.png").write_bytes(png())
    await run(http, up, provider, Call("read_file", {"path": "a.png"}, "c1"))
    (result,) = provider.requests[-1].body["messages"][-1]["content"]
    assert [block["type"] for block in result["content"]] == ["text", "image"]


async def test_only_the_newest_images_are_sent_and_older_ones_are_let_go(
    up: Gateway, http: Http, provider: Provider, start_gateway: Gateways
) -> None:
    for number in range(IMAGES_MAX + 1):
        (up.workspace / f"{number}.png").write_bytes(png(number + 1, 1))
    calls = [
        Call("read_file", {"path": f"{number}.png"}, f"c{number}")
        for number in range(IMAGES_MAX + 1)
    ]
    provider.reply(Reply(calls=calls[:-1]))
    started, _ = await run(http, up, provider, calls[-1])
    thread = started["threadId"]
    assert len(images_in(provider.requests[1])) == IMAGES_MAX
    left = images_in(provider.requests[2])
    assert left == [uri(png(number + 1, 1)) for number in range(IMAGES_STEP, IMAGES_MAX + 1)]
    told = [m["content"] for m in provider.requests[2].body["messages"] if m["role"] == "tool"]
    assert [text.endswith(IMAGES_GONE) for text in told] == [
        *[True] * IMAGES_STEP,
        *[False] * (IMAGES_MAX + 1 - IMAGES_STEP),
    ]
    before = provider.requests[2].body["messages"]
    up = await start_gateway.restart(up)
    await run(http, up, provider, threadId=thread)
    assert provider.requests[-1].body["messages"][: len(before)] == before


async def test_images_that_are_too_much_together_are_not_sent_together(
    up: Gateway, http: Http, provider: Provider
) -> None:
    big = png(filler=IMAGE_BYTES_MAX - 100)
    (up.workspace / "a.png").write_bytes(big)
    count = IMAGES_BYTES_MAX // len(big) + 1
    await run(http, up, provider, *(Call("read_file", {"path": "a.png"}) for _ in range(count)))
    sent = [len(images_in(asked)) for asked in provider.requests]
    assert sent == [*range(count), count - 1]


# -- for clients


async def test_a_server_gives_parts_and_a_client_fetches_them(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", tools={"preset": "readonly", "mcp": {"t": local()}}, security=AUTO)
    up = await start_gateway()
    started, said = await run(
        http,
        up,
        provider,
        Call("t__album", {}),
        Call("t__huge", {"bytes": 6_000_000}, "c1"),
        read_on(offset=5_999_998),
    )
    album, huge, page = ends(said)
    assert album["result"].splitlines() == [
        "look:",
        f"[image: image/png, {len(base64.b64decode(DOT))} bytes]",
        "[audio/wav, 4 bytes, which cannot be shown as text]",
        "<b>hi</b>",
        "[application/zip, 2 bytes from urn:zip, which cannot be shown as text]",
        "[the log](urn:log)",
    ]
    kinds = [(part["kind"], part.get("uri"), part.get("index")) for part in album["content"]]
    assert kinds == [
        ("json", None, None),
        ("image", None, 0),
        ("resource", "", 1),
        ("resource", "urn:page", 2),
        ("resource", "urn:zip", 3),
        ("resource", "urn:log", None),
    ]
    assert album["content"][0]["value"] == {"answer": 42}
    assert images_in(provider.requests[1]) == [f"data:image/png;base64,{DOT}"]

    async def fetched(index: object) -> tuple[int, str, str, bytes]:
        response, body = await get(http, up, started["threadId"], f"{album['seq']}/{index}")
        guess = response.headers.get("X-Content-Type-Options")
        assert response.status >= 400 or guess == "nosniff"
        shown = response.headers.get("Content-Disposition", "").partition(";")[0]
        return response.status, response.headers["Content-Type"], shown, body

    octets = "application/octet-stream"
    assert await fetched(0) == (200, "image/png", "inline", base64.b64decode(DOT))
    assert await fetched(1) == (200, "audio/wav", "attachment", b"RIFF")
    assert await fetched(2) == (200, octets, "attachment", b"<b>hi</b>")
    assert await fetched(3) == (200, octets, "attachment", b"PK")
    for index, status, code in (
        (4, 404, "output_not_found"),
        (10**9, 404, "output_not_found"),
        ("x", 400, "invalid_request"),
    ):
        found = await fetched(index)
        assert (found[0], json.loads(found[3])["error"]) == (status, code)
    for path, status, code in (
        (f"{started['threadId']}/agents/root/outputs/0", 404, "output_not_found"),
        (f"{started['threadId']}/agents/root/outputs/1", 404, "output_not_found"),
        (f"{started['threadId']}/agents/root/outputs/999999", 404, "output_not_found"),
        (f"{started['threadId']}/agents/root/outputs/-1", 400, "invalid_request"),
        (f"{started['threadId']}/agents/other/outputs/1", 404, "not_found"),
        ("thread_none/agents/root/outputs/1", 404, "not_found"),
    ):
        async with http.get(f"{up.url}/api/v1/threads/{path}") as response:
            assert (response.status, (await response.json())["error"]) == (status, code), path
    # What the protocol lets a server say in one message is kept whole.
    assert huge["outputBytesKept"] == huge["outputBytesRaw"] == 6_000_000
    assert page["result"] == "xx"


async def test_the_terminal_says_what_a_tool_gave_back(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_profile("assistant", tools={"preset": "none", "mcp": {"t": local()}}, security=AUTO)
    up = await start_gateway()
    started, _ = await run(http, up, provider, Call("t__album", {}))
    async with Client(up.url) as client:
        assert await Terminal(client, started, yes=False).follow() == 0
    assert (
        "> t__album gave back a value, image/png of 67 bytes, audio/wav of 4 bytes, text/html of "
        "9 bytes, application/zip of 2 bytes, application/octet-stream of 9 bytes\n"
    ) in capsys.readouterr().err


async def test_what_is_called_directly_is_masked_before_it_is_cut(
    start_gateway: Gateways, http: Http, tmp_path: Path
) -> None:
    servers = tmp_path / "servers.json"
    servers.write_text(json.dumps({"mcpServers": {"t": local()}}))
    up = await start_gateway(mcp_config=str(servers))
    text = "-" * (limits.OUTPUT_LIMIT_BYTES - 20) + f" {KEY} " + "-" * 200
    # Not as an argument: what looks like a key may not be one.
    (up.workspace / "a.txt").write_text(text)
    path = "/mcp/proxy/t/tools/cat"
    status, said = await post_json(
        http, up.url, path, {"arguments": {"path": str(up.workspace / "a.txt")}}
    )
    assert status == 200, said
    assert "sk-" not in json.dumps(said)
    assert MASK in json.dumps(said)


def test_content_is_absent_where_there_is_only_text() -> None:
    plain = ToolCallEnd(
        tool_call_id="c",
        tool_name="t",
        result="r",
        is_error=False,
        duration_ms=0,
        turn_index=0,
        output_bytes_raw=1,
    )
    assert {"content", "outputBytesKept"}.isdisjoint(json.loads(plain.encode()))
