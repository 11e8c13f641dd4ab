"""The web for an agent: pages as text, search through a provider, and what goes wrong with both."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from ownware_gateway.errors import BootError
from ownware_gateway.outbound import URL_CHARS_MAX, Limits
from ownware_gateway.settings import Settings
from ownware_gateway.tools import (
    OUTPUT_LIMIT_BYTES,
    Context,
    Output,
    Tool,
    ToolFailed,
    parse_arguments,
    web,
)
from ownware_gateway.tools.readable import extract, readable
from ownware_gateway.tools.sites import DIALECTS, PAGE_CHARS
from ownware_gateway.tools.todo import TASKS_MAX, TOOLS as TODO
from ownware_gateway.tools.web import RESULTS_MAX, tools
from tests.gateway import Gateways, post_json, run_events, start_run, until_status
from tests.provider import Call, Provider, Reply
from tests.sites import Names, Site, answer, moved

#: Looks like a key, opens nothing.
SEARCH_KEY = "search-" + "k" * 20

PAGE = """<!doctype html><html><head><title> All about &amp; cats </title><style>p{}</style></head>
<body><nav><a href="/">Home</a></nav><script>track("everybody")</script>
<h1>Cats</h1><p>Read <a href="more?x=1#top">more   of
it</a>.<p>A <b>last</b> word.<footer>Imprint</footer></body></html>"""


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as up:
        yield up


def tool(name: str, resolver: Names | None = None, **settings: Any) -> Tool:
    found = {tool.name: tool for tool in tools(Settings(**settings), resolver)}
    return found[name]


async def call(given: Tool, **arguments: Any) -> Output:
    """Call a tool as the engine does, its arguments checked."""
    return await given.call(Context(Path()), parse_arguments(given, json.dumps(arguments)))


async def fetch(site: Site, path: str, **arguments: Any) -> Output:
    """Fetch from a site that the operator has allowed, under a name."""
    name = f"site.example:{site.port}"
    fetching = tool("web_fetch", Names(site_example=[[site.host]]), fetch_private=(name,))
    return await call(fetching, url=f"http://{name}{path}", **arguments)


async def said(site: Site, page: bytes) -> str:
    site.pages["/"] = page
    return (await fetch(site, "/")).text.partition("\n\n")[2]


# Fetching


async def test_a_page_is_read_as_text_with_its_title_and_links(site: Site) -> None:
    site.pages["/about/cats"] = answer(PAGE, "text/html; charset=utf-8")
    result = await fetch(site, "/about/cats")
    url = f"http://site.example:{site.port}/about"
    assert result.text == (
        f"Title: All about & cats\nURL: {url}/cats\n\n"
        f"# Cats\n\nRead [more of it]({url}/more?x=1#top).\n\nA last word."
    )
    assert not result.truncated


async def test_the_address_of_a_page_is_where_redirects_have_led(site: Site) -> None:
    site.pages["/"] = moved("/new")
    site.pages["/new"] = answer("moved here")
    assert (await fetch(site, "/")).text.endswith(f":{site.port}/new\n\nmoved here")


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "text/markdown; charset=utf-8", "application/json", "application/ld+json"),
        *("text/csv", "application/atom+xml", "application/javascript", "application/yaml", None),
    ],
)
async def test_text_of_other_kinds_comes_as_it_is(kind: str | None, site: Site) -> None:
    text = '{"a": "<b>",\n  "c": 1}'
    assert await said(site, answer(text, kind)) == text


async def test_a_page_that_does_not_say_what_it_is_may_be_html(site: Site) -> None:
    assert await said(site, answer("\n<!DOCTYPE html><p>Hello", None)) == "Hello"


@pytest.mark.parametrize(
    "kind", ["image/png", "application/pdf", "application/octet-stream", "video/mp4", "font/woff"]
)
async def test_what_is_no_text_is_refused_with_its_type_and_size(kind: str, site: Site) -> None:
    site.pages["/x"] = answer(b"\x89PNG" * 10, kind)
    with pytest.raises(ToolFailed, match=rf"/x is {kind} of 40 bytes; only text can be fetched"):
        await fetch(site, "/x")


@pytest.mark.parametrize("kind", ["text/plain", None])
async def test_binary_data_is_known_under_any_name(kind: str | None, site: Site) -> None:
    site.pages["/"] = answer(b"\x7fELF\0\0\0", kind)
    with pytest.raises(ToolFailed, match="is binary, 7 bytes of"):
        await fetch(site, "/")


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "404 Not Found"), (403, "403 Forbidden"), (500, "500 Internal"), (999, "999.")],
)
async def test_an_error_of_the_server_is_told_by_its_number(
    status: int, words: str, site: Site
) -> None:
    site.pages["/"] = answer("<p>No", "text/html", status)
    with pytest.raises(ToolFailed, match=f"answered with {words}"):
        await fetch(site, "/")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ("größer".encode(), "text/plain"),
        ("größer".encode(), "text/plain; charset=no-such"),
        ("größer".encode(), "text/plain; charset=zlib"),
        ("größer".encode("latin-1"), "text/plain; charset=iso-8859-1"),
        ("größer".encode("latin-1"), 'text/plain; charset="ISO-8859-1"'),
        ("größer".encode("utf-16"), "text/plain"),
        ("größer".encode("utf-16-le"), "text/plain; charset=utf-16le"),
        ("größer".encode("utf-8-sig"), "text/plain; charset=iso-8859-1"),
        (b"<meta charset=windows-1252><p>" + "größer".encode("cp1252"), "text/html"),
        (b"<meta charset=utf-16><p>" + "größer".encode(), "text/html"),
        (
            b'<META http-equiv="Content-Type" content="text/html; charset=ISO-8859-15">'
            + "größer".encode("latin-1"),
            "text/html",
        ),
        (b"<meta charset=latin-1><p>" + "größer".encode(), "text/html; charset=utf-8"),
    ],
)
async def test_the_encoding_is_found_wherever_it_is_said(raw: bytes, kind: str, site: Site) -> None:
    assert await said(site, answer(raw, kind)) == "größer"


async def test_a_long_page_is_read_in_parts(site: Site) -> None:
    text = "".join(f"{number:06}\U0001f408" for number in range(5000))
    site.pages["/"] = answer(text)
    read, offset = "", 0
    for _ in range(10):
        result = await fetch(site, "/", offset=offset)
        assert len(result.text.encode()) <= OUTPUT_LIMIT_BYTES
        part, _, note = result.text.partition("\n\n")[2].partition("\n")
        read += part
        if not note:
            break
        offset += PAGE_CHARS
        assert result.truncated
        assert note.endswith(f"of 35000 characters are shown; go on with offset {offset}]")
    assert read == text
    with pytest.raises(ToolFailed, match="has 35000 characters; offset 35000 is past its end"):
        await fetch(site, "/", offset=35_000)


async def test_of_an_endless_page_the_beginning_is_read_and_that_is_said(site: Site) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    site.pages["/"] = endless
    result = await fetch(site, "/", offset=Limits().bytes_max - 10)
    assert result.text.endswith(
        f"\n\nxxxxxxxxxx\n[only the first {Limits().bytes_max} bytes of it were read]"
    )
    assert result.truncated


async def test_a_page_without_text_is_said_to_have_none(site: Site) -> None:
    assert await said(site, answer("<script>go()</script>", "text/html")) == "[there is no text]"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/", "127.0.0.1 is not a public address"),
        ("http://metadata.example/", "metadata.example leads to 169.254.169.254"),
        ("file:" + "//host/etc/passwd", "Only http:// and https:// addresses"),
        ("http://example.com:22/", "Port 22 of example.com is not open"),
        ("example.com", "The address names no host"),
    ],
)
async def test_what_may_not_be_fetched_is_told_to_the_model(url: str, words: str) -> None:
    metadata = Names(metadata_example=[["169.254.169.254"]])
    with pytest.raises(ToolFailed, match=words):
        await call(tool("web_fetch", metadata), url=url)


def test_a_private_place_that_is_none_stops_the_start() -> None:
    with pytest.raises(BootError, match=r"'10\.0\.0\.1/8' is not a network"):
        tools(Settings(fetch_private=("10.0.0.1/8",)))


# Text out of HTML


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<div>a</div><div>b</div>", "a\nb"),
        ("a <i> b</i> c", "a b c"),
        ("a<i>b</i>", "ab"),
        ("<p>a\n\n  b", "a b"),
        ("<h2>a</h2>b<h3>c", "## a\n\nb\n\n### c"),
        ("<ul><li>a<li>b<ol><li>c</li><li>d</ol></ul>e", "- a\n- b\n  1. c\n  2. d\ne"),
        ("<pre>a\n  b\n</pre>c", "```\na\n  b\n```\nc"),
        ("<table><tr><th>a<th>b<tr><td>c<td>d</table>", "a | b\nc | d"),
        ("a<hr>b", "a\n\n---\n\nb"),
        ('<img alt=" a  cat ">', "[image: a cat]"),
        ("<a href=x>y</a>", "[y](https://e.example/d/x)"),
        ("<a href=//f.example>y</a>", "[y](https://f.example)"),
        ("<a href=#x>y</a> <a>z</a>", "y z"),
        ("<a href=javascript:alert(1)>y</a>", "y"),
        ("<a href='data:,x'>y</a>", "y"),
        ("<a href='http://[x'>y</a>", "y"),
        ("<a href=x><img></a>y", "y"),
        ("a<!-- b -->c<![foo[d]]>e<?php f ?>g", "aceg"),
        ("&lt;b&gt; &eacute;&#x1F408;&#xD800;", "<b> é\U0001f408\ufffd"),
        ("<nav>a<div>b</nav>c</div><aside>d</aside>", "c"),
        ("<svg><title>a</title></svg>b<svg/>c", "bc"),
        ("a</p></ul></a></main></pre>b", "a\n\nb"),
        ("<main>x</main>", "x"),
        (f"<p>around<main><p>{'word ' * 50}</main><p>more", ("word " * 50).strip()),
        ("", ""),
    ],
)
def test_html_becomes_text(html: str, text: str) -> None:
    found = extract(html, "https://e.example/d/")[1]
    assert found.replace("\n```\n```", "") == text


async def test_a_page_that_was_made_to_take_for_ever_comes_to_an_end() -> None:
    async with asyncio.timeout(10):
        with suppress(ToolFailed):  # Newer Pythons are through with it in time.
            await readable("<!--" * 400_000, "https://e.example/", {}, time_limit_s=0.3)


async def test_a_page_that_takes_too_long_is_said_to() -> None:
    with pytest.raises(ToolFailed, match=r"cannot be made readable in 0\.001 s"):
        await readable("<p>x" * 200_000, "https://e.example/", {}, time_limit_s=0.001)


def children() -> int:
    """Return how many child processes there are."""
    found = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/stat"))
    own = str(os.getpid()).encode()
    return sum(stat.rpartition(b")")[2].split()[1] == own for stat in found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
async def test_nothing_is_left_of_a_page_when_its_reading_is_cancelled() -> None:
    before = children()
    reading = asyncio.ensure_future(readable("<p>x" * 200_000, "https://e.example/", {}))
    async with asyncio.timeout(10):
        while children() == before:
            await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert children() == before


async def test_links_cannot_blow_a_page_up() -> None:
    html = "<a href=x>y</a>" * 20_000
    title, text = await readable(html, "https://e.example/" + "a" * 450 + "/", {})
    assert (title, len(text)) == ("", 2_000_000)


# Searching

RESULTS: list[dict[str, Any]] = [
    {"title": "One <strong>cat</strong>", "url": "https://one.example/", "text": "A &amp; B\n c"},
    {"title": "Two", "url": "https://two.example/?a=b", "text": None},
    {"title": "Not the web", "url": "javascript:alert(1)", "text": "x"},
    {"title": "Three", "url": "http://three.example", "text": "x" * 1000},
]


def answered(provider: str, results: list[dict[str, Any]]) -> bytes:
    """Return what a provider would answer."""
    dialect = DIALECTS[provider]
    found: Any = [
        {"title": item["title"], "url": item["url"], dialect.snippet: item["text"]}
        for item in results
    ]
    for name in reversed(dialect.path):
        found = {name: found}
    return answer(json.dumps(found | {"query": "x", "more": None}), "application/json")


PATHS = {"searxng": "/search", "brave": "/res/v1/web/search", "tavily": "/search"}


def search(provider: str, site: Site, resolver: Names | None = None, **settings: Any) -> Tool:
    given = {"search_provider": provider, "search_base_url": site.url, **settings}
    if provider != "searxng":
        given.setdefault("search_api_key", SEARCH_KEY)
    return tool("web_search", resolver, **given)


@pytest.mark.parametrize("provider", DIALECTS)
async def test_results_are_numbered_with_address_and_words(provider: str, site: Site) -> None:
    site.pages[PATHS[provider]] = answered(provider, RESULTS)
    result = await call(search(provider, site), query="cats & dogs")
    assert result.text == (
        "1. One cat\n   https://one.example/\n   A & B c\n\n"
        "2. Two\n   https://two.example/?a=b\n\n"
        "3. Three\n   http://three.example\n   " + "x" * 599 + "…"
    )


async def test_each_provider_is_asked_in_its_own_way(site: Site) -> None:
    for provider, path in PATHS.items():
        site.pages[path] = answered(provider, [])
        await call(search(provider, site), query="ä & b", max_results=7)
    searxng, brave, tavily = site.visits

    def asked(line: str) -> dict[str, list[str]]:
        return parse_qs(urlsplit(line.split()[1]).query)

    assert asked(searxng.line) == {"q": ["ä & b"], "format": ["json"]}
    assert asked(brave.line) == {"q": ["ä & b"], "count": ["7"]}
    assert brave.headers["X-Subscription-Token"] == SEARCH_KEY
    assert tavily.line.startswith("POST ")
    assert json.loads(tavily.body) == {"query": "ä & b", "max_results": 7}
    assert tavily.headers["Authorization"] == f"Bearer {SEARCH_KEY}"


@pytest.mark.parametrize(
    ("provider", "address"),
    [("brave", "https://api.search.brave.com"), ("tavily", "https://api.tavily.com")],
)
async def test_a_provider_of_the_internet_is_asked_at_its_own_address(
    provider: str, address: str
) -> None:
    looking = Names()
    given = tool("web_search", looking, search_provider=provider, search_api_key=SEARCH_KEY)
    with pytest.raises(ToolFailed, match=f"^{provider} could not be asked. The name"):
        await call(given, query="x")
    assert looking.lookups == [address.removeprefix("https://")]


async def test_no_more_results_are_given_than_were_asked_for(site: Site) -> None:
    many = [{"title": f"T{n}", "url": f"https://{n}.example", "text": ""} for n in range(50)]
    site.pages["/search"] = answered("searxng", many)
    for count in (1, RESULTS_MAX):
        result = await call(search("searxng", site), query="x", max_results=count)
        assert result.text.count("https://") == count


@pytest.mark.parametrize("provider", DIALECTS)
async def test_nothing_found_is_no_error(provider: str, site: Site) -> None:
    for page in (answered(provider, []), answer("{}")):
        site.pages[PATHS[provider]] = page
        result = await call(search(provider, site), query="x")
        assert result.text == "Nothing was found; other words may find something."


@pytest.mark.parametrize(
    ("provider", "status", "words"),
    [
        ("brave", 401, "401 Unauthorized: it refused the key in OWNWARE_SEARCH_API_KEY"),
        ("tavily", 403, "it refused the key"),
        ("brave", 429, "429 Too Many Requests: its limit for this key is reached"),
        ("tavily", 432, "432: its limit for this key is reached"),
        ("searxng", 403, "its search.formats setting must list json"),
        ("searxng", 500, "500 Internal Server Error: that is no answer to a search"),
        ("searxng", 302, "302 Found: that is no answer to a search"),
    ],
)
async def test_what_the_operator_has_to_do_is_said(
    provider: str, status: int, words: str, site: Site
) -> None:
    site.pages[PATHS[provider]] = answer("no", status=status, Location="http://10.0.0.1/")
    with pytest.raises(ToolFailed, match=f"^{provider} answered with .*{words}") as raised:
        await call(search(provider, site), query="x")
    assert SEARCH_KEY not in str(raised.value)


@pytest.mark.parametrize(
    "body",
    [
        *("", "<html>", "[]", "17", '{"results": 5}', '{"results": [5]}', '{"results": [{}]}'),
        "[" * 100_000,
    ],
)
async def test_an_answer_that_holds_no_results_is_said_to(body: str, site: Site) -> None:
    site.pages["/search"] = answer(body, "application/json")
    with pytest.raises(ToolFailed, match=r"^searxng answered with something else than results"):
        await call(search("searxng", site), query="x")


async def test_a_search_reaches_its_provider_and_nothing_else(site: Site) -> None:
    address = f"http://search.example:{site.port}/"
    turning = Names(search_example=[["127.0.0.1"]])
    site.pages["/search"] = answered("searxng", RESULTS)
    given = search("searxng", site, turning, search_base_url=address)
    assert "one.example" in (await call(given, query="x")).text
    with pytest.raises(ToolFailed, match="is not a public address"):
        await call(tool("web_fetch", turning), url=f"http://127.0.0.1:{8080}/")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search_provider": "bing"}, "must be one of: searxng, brave, tavily"),
        ({"search_provider": "brave"}, "brave wants a key; set OWNWARE_SEARCH_API_KEY"),
        ({"search_provider": "searxng"}, "must be the http address of searxng"),
        (
            {"search_provider": "searxng", "search_base_url": "ftp://x"},
            "must be the http address of searxng",
        ),
        (
            {"search_provider": "searxng", "search_base_url": "http://u:" + "p@x"},
            "without a login",
        ),
    ],
)
def test_a_search_that_is_set_up_wrong_stops_the_start(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(BootError, match=words) as refused:
        tools(Settings(**settings))
    assert "u:p" not in str(refused.value)


# The list of tasks


async def test_a_list_of_tasks_is_shown_as_it_is_now() -> None:
    tasks = [
        {"content": "Read  the\nissue", "status": "completed"},
        {"content": "Write it", "status": "in_progress"},
        {"content": "Test it"},
    ]
    result = await call(TODO[0], tasks=tasks)
    assert result.text == "[x] 1. Read the issue\n[~] 2. Write it\n[ ] 3. Test it"
    assert (await call(TODO[0], tasks=[])).text == "The list is empty."


@pytest.mark.parametrize(
    "tasks",
    [
        "Write it",
        ["Write it"],
        [{}],
        [{"content": " "}],
        [{"content": "x" * 501}],
        [{"content": "x", "status": "done"}],
        [{"content": "x", "id": 1}],
        [{"content": "x"}] * (TASKS_MAX + 1),
    ],
)
async def test_a_list_of_tasks_that_is_none_is_refused(tasks: Any) -> None:
    with pytest.raises(ToolFailed, match="The arguments of todo_write do not fit"):
        await call(TODO[0], tasks=tasks)


# Through a gateway


async def test_a_fetch_asks_a_person_and_then_brings_the_page(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider, site: Site
) -> None:
    site.pages["/"] = answer(PAGE, "text/html")
    up = await start_gateway(fetch_private=(f"127.0.0.1:{site.port}",))
    provider.reply(Reply(calls=[Call("web_fetch", {"url": f"{site.url}/"})]), Reply(text=["Ok."]))
    run = await start_run(http, up.url, "What does it say?")
    await until_status(http, up.url, run, "waiting")
    assert site.connections == 0
    path = f"/threads/{run['threadId']}/resume"
    assert (await post_json(http, up.url, path, {"action": "approve"}))[0] == 200
    (ended,) = [
        event
        for event in await run_events(http, up.url, run["runId"])
        if event["type"] == "tool.call.end"
    ]
    assert "Title: All about & cats" in ended["result"]
    assert not ended["isError"]


async def test_a_search_and_a_list_of_tasks_ask_nobody(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider, site: Site
) -> None:
    leaky = [{"title": "Key", "url": "https://one.example/", "text": f"It is {SEARCH_KEY}."}]
    site.pages["/search"] = answered("tavily", leaky)
    up = await start_gateway(
        search_provider="tavily", search_base_url=site.url, search_api_key=SEARCH_KEY
    )
    calls = [
        Call("web_search", {"query": "cats"}),
        Call("todo_write", {"tasks": [{"content": "Read on"}]}),
    ]
    provider.reply(Reply(calls=calls), Reply(text=["Ok."]))
    run = await start_run(http, up.url, "What are cats?")
    ended = {
        event["toolName"]: event["result"]
        for event in await run_events(http, up.url, run["runId"])
        if event["type"] == "tool.call.end"
    }
    assert ended == {
        "web_search": "1. Key\n   https://one.example/\n   It is [secret].",
        "todo_write": "[ ] 1. Read on",
    }


async def test_a_search_that_nobody_set_up_is_offered_to_no_agent(
    start_gateway: Gateways, http: aiohttp.ClientSession, provider: Provider, make_profile: Any
) -> None:
    make_profile("assistant", tools={"preset": "none", "allow": ["web_search", "web_fetch"]})
    up = await start_gateway()
    run = await start_run(http, up.url, "Hello")
    await run_events(http, up.url, run["runId"])
    (asked,) = provider.requests
    assert [item["function"]["name"] for item in asked.body["tools"]] == ["web_fetch"]


def test_an_address_may_be_as_long_for_the_model_as_for_the_guard() -> None:
    assert web.URL_CHARS_MAX == URL_CHARS_MAX
