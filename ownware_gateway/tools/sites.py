"""What `web_fetch` and `web_search` do: pages as text, search through a provider of the operator.

Both go out through `outbound`. A fetch reaches public addresses and what the operator has named; a
search reaches the one provider that the operator has chosen, wherever that is.
"""

import codecs
import functools
import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode

from aiohttp import ClientResponse
from aiohttp.abc import AbstractResolver
from yarl import URL

from ownware_gateway.errors import BootError
from ownware_gateway.outbound import (
    Limits,
    NotReached,
    Outbound,
    Policy,
    Request,
)
from ownware_gateway.settings import Settings
from ownware_gateway.tools import Context, Output, ToolFailed, Whole, clip, cut, keepable
from ownware_gateway.tools.readable import readable
from ownware_gateway.tools.web import RESULTS_DEFAULT, URL_CHARS_MAX

#: Characters of a page that one call returns: with the lines above them, always within the limit
#: of an output, whatever the characters are.
PAGE_CHARS: Final = 15_000

#: A body with a NUL in its first bytes, this many, is binary.
BINARY_PROBE_BYTES: Final = 8192

#: How far into a page its encoding may be declared
#: (https://html.spec.whatwg.org/multipage/parsing.html#prescan-a-byte-stream-to-determine-its-encoding).
PRESCAN_BYTES: Final = 1024

SEARCH_LIMITS: Final = Limits(redirects_max=0)

RESULT_TITLE_CHARS_MAX: Final = 200
SNIPPET_CHARS_MAX: Final = 600

_HTML: Final = frozenset({"text/html", "application/xhtml+xml"})
_TEXT: Final = re.compile(
    r"text/.+|application/(?:[^/]+\+)?(?:json|xml|yaml|toml|sql)"
    r"|application/(?:x-)?(?:javascript|ecmascript|ndjson|yaml|sh|tex)"
)
_DECLARED: Final = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.I)
_BOMS: Final = {codecs.BOM_UTF8: "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

#: Encodings that a page may have (https://encoding.spec.whatwg.org/#names-and-labels); Python
#: knows others under such names that are slow, or no encodings of text.
_ENCODINGS: Final = frozenset(
    {
        *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "gbk", "gb2312", "gb18030"),
        *("big5", "euc_jp", "iso2022_jp", "shift_jis", "euc_kr", "cp949", "cp932"),
        *("koi8-r", "koi8-u", "mac-roman", "cp866", "cp874", "tis-620"),
        *(f"cp{number}" for number in range(1250, 1259)),
        *(f"iso8859-{number}" for number in range(1, 17)),
    }
)

_TAG: Final = re.compile(r"</?[a-zA-Z][^<>]{0,100}>")


def means(
    settings: Settings, resolver: AbstractResolver | None = None
) -> tuple[Callable[..., Awaitable[Output]], Callable[..., Awaitable[Output]]]:
    """Return what fetches and what searches, as the settings have it.

    `resolver` is how names are looked up. Raises BootError for a setting that does not fit.
    """
    try:
        policy = Policy.naming(settings.fetch_private)
        provider = _provider(settings)
    except ValueError as error:
        raise BootError(f"{error}.") from None
    return (
        functools.partial(web_fetch, policy, resolver),
        functools.partial(web_search, provider, resolver),
    )


async def web_fetch(
    policy: Policy, resolver: AbstractResolver | None, context: Context, arguments: dict[str, Any]
) -> Output:
    """Fetch a page and return a part of its text. Raises ToolFailed."""
    try:
        async with (
            Outbound(policy, resolver=resolver) as outbound,
            outbound.open(Request(arguments["url"], headers={"Accept": _ACCEPT})) as response,
        ):
            kind = _kind(response)
            body, whole = await outbound.read(response)
    except NotReached as error:
        raise ToolFailed(str(error)) from error
    address = str(response.url)
    is_html = kind in _HTML or (not kind and _looks_like_html(body))
    encoding = _encoding_of(body, response.charset, is_html=is_html)
    if b"\0" in body[:BINARY_PROBE_BYTES] and not encoding.startswith("utf-16"):
        raise ToolFailed(f"{address} is binary, {len(body)} bytes of {kind or 'no named type'}.")
    title, text = "", body.decode(encoding, "replace")
    if is_html:
        title, text = await readable(text, address, context.environment)
    notes = [] if whole else [f"[only the first {len(body)} bytes of it were read]"]
    return _page(f"Title: {title}\n" * bool(title) + f"URL: {address}\n", text, arguments, notes)


_ACCEPT: Final = "text/html, application/xhtml+xml, text/*;q=0.9, application/json;q=0.9, */*;q=0.1"


def _kind(response: ClientResponse) -> str:
    """Return the type of a response's body, which must be text; empty when it names none."""
    address = str(response.url)
    if response.status // 100 != 2:
        raise ToolFailed(f"{address} answered with {_status(response.status)}.")
    kind = response.content_type if "Content-Type" in response.headers else ""
    if kind and kind not in _HTML and not _TEXT.fullmatch(kind):
        size = response.content_length
        length = "of unknown size" if size is None else f"of {size} bytes"
        raise ToolFailed(f"{address} is {kind[:100]} {length}; only text can be fetched.")
    return kind


def _status(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:  # The phrase that the server sent could be any text.
        return str(status)


def _looks_like_html(body: bytes) -> bool:
    return bool(re.match(rb"\s*<(?:!doctype html|html|head|body)\b", body[:PRESCAN_BYTES], re.I))


def _encoding_of(body: bytes, charset: str | None, *, is_html: bool) -> str:
    """Return a body's encoding: by its byte order mark, its header, its declaration, or UTF-8."""
    encoding = next((name for mark, name in _BOMS.items() if body.startswith(mark)), None)
    if encoding is None and charset:
        encoding = _encoding(charset)
    if encoding is None and is_html and (found := _DECLARED.search(body[:PRESCAN_BYTES])):
        encoding = _encoding(found[1].decode("ascii", "replace"))
        # What could be read as ASCII up to here is not UTF-16, whatever it says.
        encoding = None if encoding and encoding.startswith("utf-16") else encoding
    return encoding or "utf-8"


def _encoding(label: str) -> str | None:
    try:
        name = codecs.lookup(label.strip("\"' ")).name
    except (LookupError, ValueError):
        return None
    # Browsers read these as what they are in truth.
    name = {"ascii": "cp1252", "iso8859-1": "cp1252", "utf-16": "utf-16-le"}.get(name, name)
    return name if name in _ENCODINGS else None


def _page(head: str, text: str, arguments: dict[str, Any], notes: list[str]) -> Output:
    """Return the part of a text that was asked for, under its head."""
    first: int = arguments.get("offset", 0)
    if first and first >= len(text):
        raise ToolFailed(f"The page has {len(text)} characters; offset {first} is past its end.")
    part = text[first : first + PAGE_CHARS]
    last = first + len(part)
    if last < len(text):
        notes.insert(
            0, f"[{first} to {last} of {len(text)} characters are shown; go on with offset {last}]"
        )
    said = f"{head}\n{part or '[there is no text]'}"
    size = len(text.encode("utf-8", "replace"))
    under = "".join(f"\n{note}" for note in notes)
    if last == len(text):
        return Output(clip(said + under).text, truncated=bool(notes), bytes_raw=size)
    # The rest is at hand: it need not be fetched again.
    whole = keepable(f"{head}\n{text[first:]}".encode("utf-8", "replace"))
    return cut(Whole(whole, len(said.encode("utf-8", "replace")), under), size)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a provider of search is asked, and where its answer has the results.

    `request` gets the address, the key, the query and the number of results; `path` leads to the
    list of results, each of which has a `title`, a `url` and in `snippet` a piece of the page.
    """

    address: str
    request: Callable[[str, str, str, int], Request]
    path: tuple[str, ...]
    snippet: str


@dataclass(frozen=True, slots=True)
class Provider:
    """Who is asked to search the web."""

    name: str
    dialect: Dialect
    address: str
    policy: Policy
    key: str = field(default="", repr=False)


def _ask_searxng(address: str, key: str, query: str, count: int) -> Request:
    """https://docs.searxng.org/dev/search_api.html ; it returns as many results as it likes."""
    return Request(f"{address}/search?{urlencode({'q': query, 'format': 'json'})}")


def _ask_brave(address: str, key: str, query: str, count: int) -> Request:
    """https://api-dashboard.search.brave.com/app/documentation/web-search/get-started ."""
    return Request(
        f"{address}/res/v1/web/search?{urlencode({'q': query, 'count': count})}",
        headers={"Accept": "application/json", "X-Subscription-Token": key},
    )


def _ask_tavily(address: str, key: str, query: str, count: int) -> Request:
    """https://docs.tavily.com/documentation/api-reference/endpoint/search ."""
    return Request(
        f"{address}/search",
        method="POST",
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        body=json.dumps({"query": query, "max_results": count}).encode(),
    )


DIALECTS: Final[Mapping[str, Dialect]] = {
    "searxng": Dialect("", _ask_searxng, ("results",), "content"),
    "brave": Dialect("https://api.search.brave.com", _ask_brave, ("web", "results"), "description"),
    "tavily": Dialect("https://api.tavily.com", _ask_tavily, ("results",), "content"),
}


def _provider(settings: Settings) -> Provider | None:
    """Return who is asked, None when nobody is set. Raises ValueError for what does not fit."""
    name, key = settings.search_provider, settings.search_api_key
    if not name:
        return None
    if name not in DIALECTS:
        known = ", ".join(DIALECTS)
        raise ValueError(f"OWNWARE_SEARCH_PROVIDER is {name!r}; it must be one of: {known}")
    dialect = DIALECTS[name]
    if dialect.address and not key:
        raise ValueError(f"{name} wants a key; set OWNWARE_SEARCH_API_KEY")
    address = (settings.search_base_url or dialect.address).rstrip("/")
    url = URL(address)
    if url.scheme not in ("http", "https") or not url.host or url.user or url.query_string:
        raise ValueError(
            f"OWNWARE_SEARCH_BASE_URL must be the http address of {name}, without a login"
        )
    # The operator has named it, so it may be on this machine.
    policy = Policy.naming([f"{url.host_subcomponent}:{url.port}"])
    return Provider(name, dialect, address, policy, key)


async def web_search(
    provider: Provider | None,
    resolver: AbstractResolver | None,
    context: Context,
    arguments: dict[str, Any],
) -> Output:
    """Search the web and return the results, numbered. Raises ToolFailed."""
    if provider is None:
        raise ToolFailed("Web search is not set up here: OWNWARE_SEARCH_PROVIDER names nobody.")
    query, count = arguments["query"], arguments.get("max_results", RESULTS_DEFAULT)
    request = provider.dialect.request(provider.address, provider.key, query, count)
    try:
        async with (
            Outbound(provider.policy, SEARCH_LIMITS, resolver) as outbound,
            outbound.open(request) as response,
        ):
            _check_answer(provider, response.status)
            body, _ = await outbound.read(response)
    except NotReached as error:
        raise ToolFailed(f"{provider.name} could not be asked. {error}") from error
    results = _results(provider, body)[:count]
    lines = [f"{number}. {result}" for number, result in enumerate(results, 1)]
    return clip("\n\n".join(lines) or "Nothing was found; other words may find something.")


def _check_answer(provider: Provider, status: int) -> None:
    """Raise ToolFailed, with what the operator can do, unless the status is that of an answer."""
    if status == HTTPStatus.OK:
        return
    match status:
        case 401 | 403 if provider.key:
            why = "it refused the key in OWNWARE_SEARCH_API_KEY"
        case 403 if provider.name == "searxng":
            why = "its search.formats setting must list json"
        case 402 | 429 | 432 | 433:
            why = "its limit for this key is reached"
        case _:
            why = "that is no answer to a search"
    raise ToolFailed(f"{provider.name} answered with {_status(status)}: {why}.")


def _results(provider: Provider, body: bytes) -> list[str]:
    """Return the results of an answer as text; one without a web address is left out."""
    try:
        found: Any = json.loads(body)
        for name in provider.dialect.path:
            # A provider that found nothing may leave it all out.
            found = found.get(name) or {}
        return [
            f"{_line(item.get('title'), RESULT_TITLE_CHARS_MAX)}\n   {item['url']}\n"
            f"   {_line(item.get(provider.dialect.snippet), SNIPPET_CHARS_MAX)}".rstrip()
            for item in list(found)
            if re.fullmatch(r"https?://[!-~\x80-\U0010ffff]+", str(item["url"])[:URL_CHARS_MAX])
        ]
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        raise ToolFailed(f"{provider.name} answered with something else than results.") from None


def _line(text: object, chars_max: int) -> str:
    """Return a text of a result on one line: providers mark the words of the query with tags."""
    plain = html.unescape(_TAG.sub("", text)) if isinstance(text, str) else ""
    line = " ".join(plain.split())
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"
