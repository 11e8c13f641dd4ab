"""Who may connect: the guards that every request passes before a door sees it.

In this order, the first refusal wins:

1. host: the Host header is a name that the gateway serves, or a web page that points its own name
   at us (DNS rebinding) could use a browser inside the network;
2. proxy: a proxy in front of an open gateway would be an open shell;
3. origin: a foreign web page may not change anything; a preflight is answered here;
4. limits: before the token, so that guessing is limited as well;
5. token.

All raise GatewayError and leave the answer to whoever handles errors outside of them.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.masking import MASK, SECRET_NAME
from ownware_gateway.settings import Settings

if TYPE_CHECKING:
    from limits.aio.strategies import MovingWindowRateLimiter

#: Who asks: "token", "local" where no token is needed, "anonymous" on a path that needs none.
CALLER: Final = web.RequestKey("CALLER", str)

#: Set when the caller is over its limit and a 429 would end its EventSource for good: the door
#: opens the stream, says `stream.shutdown` with this many seconds, and ends.
LIMITED: Final = web.RequestKey("LIMITED", float)

OPEN_PATHS: Final = frozenset({"/health", "/api/v1/health"})
SAFE_METHODS: Final = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
ALLOW_METHODS: Final = "GET, HEAD, POST, PUT, PATCH, DELETE"
ALLOW_HEADERS: Final = (
    "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key, X-Conversation-Id, "
    "X-OpenWebUI-Chat-Id"
)
EXPOSE_HEADERS: Final = (
    "X-Ownware-Correlation-Id, Location, Idempotency-Replayed, Retry-After, X-Run-Id, "
    "X-Conversation-Id"
)
PREFLIGHT_MAX_AGE_S: Final = 600
WINDOW_S: Final = 60.0

#: Callers counted one by one; those beyond share one count, so that memory stays bounded.
CALLERS_MAX: Final = 1_000
OTHERS: Final = "others"

#: What the end of a path says of a POST: it starts a run.
RUNS: Final = ("/run", "/chat/completions", "/execute")

#: What the official OpenAI clients tell of themselves, in a browser too.
_OF_OPENAI: Final = re.compile(r"(?:x-stainless|openai)-[a-z-]+")

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_AUTHORITY: Final = re.compile(
    r"(\[[0-9A-Fa-f:.]+(?:%[\w.%-]+)?\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?", re.ASCII
)
_ORIGIN: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#@\s]+)")

Signal = Callable[[web.Request, web.StreamResponse], Awaitable[None]]
Origin = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class Access:
    """What holds for the address that the gateway listens on.

    `exposed` means that others than this machine can reach it; `token` is what they must show
    when `token_required`. `served_names` are lower-case host names beside the local ones.
    """

    exposed: bool
    token_required: bool
    token: str = field(default="", repr=False)
    behind_proxy: bool = False
    served_names: frozenset[str] = frozenset()
    allowed_origins: frozenset[Origin] = frozenset()
    rate_limit_run: int = 60
    rate_limit_general: int = 600

    @property
    def limited(self) -> bool:
        """Whether callers have a rate limit: wherever somebody else may call."""
        return self.exposed or self.behind_proxy

    @property
    def warning(self) -> str | None:
        """What the operator must hear at the start, if anything."""
        if not self.exposed or self.behind_proxy:
            return None
        return (
            "This gateway can be reached from other machines over plain HTTP: the token and all "
            "that is said can be read on the way. Listen on 127.0.0.1, or put a TLS proxy in "
            "front and start with --behind-proxy."
        )


def decide(settings: Settings, token: str = "") -> Access:
    """Return who may connect under these settings; a host name is resolved now.

    Raises BootError for a combination that is not safe, and for a name or origin that is not one.
    """
    exposed = not is_loopback(settings.host)
    asked = settings.require_auth or bool(settings.api_key)
    token_required = exposed or settings.behind_proxy or asked
    if token_required and not token:
        where = settings.host or "all addresses"
        raise BootError(f"A gateway on {where} needs a token with these settings, and has none.")
    names = {_served_name(name) for name in settings.served_name}
    bind = _split(settings.host)
    if bind is not None and _address(bind[0]) is None:
        names.add(bind[0])
    return Access(
        exposed=exposed,
        token_required=token_required,
        token=token,
        behind_proxy=settings.behind_proxy,
        served_names=frozenset(names),
        allowed_origins=frozenset(map(_listed_origin, settings.cors_origin)),
        rate_limit_run=settings.rate_limit_run,
        rate_limit_general=settings.rate_limit_general,
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a listener on this host.

    A name counts if it resolves to nothing but loopback addresses; in doubt, it does not count.
    """
    host = host.removeprefix("[").removesuffix("]").rstrip(".").lower()
    if not host:
        return False
    if host == "localhost":
        return True
    address = _address(host)
    if address is not None:
        return address.is_loopback
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    addresses = [_address(str(entry[4][0])) for entry in found]
    return bool(addresses) and all(a is not None and a.is_loopback for a in addresses)


def protect(app: web.Application, access: Access, clock: Callable[[], float]) -> None:
    """Put the guards inside what an application has already, and its headers on every answer.

    `clock` tells seconds since the epoch. The middleware that answers a GatewayError must be
    there before.
    """
    app.middlewares.append(guard(access, clock))
    app.on_response_prepare.append(response_headers(access))


def guard(access: Access, clock: Callable[[], float]) -> Middleware:
    """Return the middleware that lets a request in, or says why not.

    One for all the checks: a stream that is open for days holds the frames of every middleware.
    """
    limits = _Limits(access, clock) if access.limited else None

    @web.middleware
    async def let_in(request: web.Request, handler: Handler) -> web.StreamResponse:
        _check_host(access, request)
        _check_proxy(access, request)
        if (preflight := _check_origin(access, request)) is not None:
            return preflight
        if limits is not None:
            await _check_limits(access, limits, request)
        _check_token(access, request)
        return await handler(request)

    return let_in


def _check_host(access: Access, request: web.Request) -> None:
    """Refuse a request for a host that is not served here."""
    hosts = request.headers.getall(hdrs.HOST, [])
    # A target in absolute form has a host of its own, which must be as good.
    if len(hosts) != 1 or not all(serves(access, host) for host in (hosts[0], request.host)):
        raise GatewayError(
            "forbidden_host",
            "This gateway does not serve the host of the request; "
            "start it with --served-name if it should.",
        )


def _check_proxy(access: Access, request: web.Request) -> None:
    """Refuse what came through a proxy, where the gateway was not told of one."""
    if not access.exposed and not access.behind_proxy and _proxied(request):
        raise GatewayError(
            "forbidden_proxy",
            "The request came through a proxy, which this gateway does not expect; "
            "start it with --behind-proxy to ask every caller for the token.",
        )


def _check_origin(access: Access, request: web.Request) -> web.StreamResponse | None:
    """Refuse a change that a foreign web page asks for; return the answer to a preflight."""
    if hdrs.ORIGIN not in request.headers:
        return None
    if (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    ):
        return _preflight(access, request)
    if request.method not in SAFE_METHODS and not (
        _is_own_origin(access, request) or _is_allowed_origin(access, request)
    ):
        raise GatewayError(
            "forbidden_origin",
            "Web pages of this origin may not change anything here; "
            "start the gateway with --cors-origin if they should.",
        )
    return None


async def _check_limits(access: Access, limits: "_Limits", request: web.Request) -> None:
    """Refuse what is over the caller's limit.

    A caller is an address. Behind a proxy all requests come from the proxy's, so there all
    holders of the token are one caller, and all others another.
    """
    wait_s = await limits.hit(request)
    if wait_s is None:
        return
    # Only for those who may have the stream: nobody may guess tokens without a limit.
    if not _reconnects(request) or identify(access, request) is None:
        raise GatewayError(
            "rate_limited",
            f"Too many requests; try again in {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )
    request[LIMITED] = wait_s


def _check_token(access: Access, request: web.Request) -> None:
    """Refuse who needs the token and does not show it; note who calls."""
    caller = identify(access, request)
    if caller is None and _path(request) not in OPEN_PATHS:
        raise GatewayError(
            "unauthorized",
            "The token is missing or wrong; send it as 'Authorization: Bearer <token>'. "
            "It is in the file gateway-token of the data directory, unless it was chosen.",
        )
    request[CALLER] = caller or "anonymous"


def response_headers(access: Access) -> Signal:
    """Return a signal for `on_response_prepare`: streamed answers and errors get these too."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        # Also where there is no Origin: a cache must not give that answer to another page.
        vary = response.headers.get(hdrs.VARY)
        response.headers[hdrs.VARY] = f"{vary}, {hdrs.ORIGIN}" if vary else hdrs.ORIGIN
        if _is_allowed_origin(access, request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSE_HEADERS
        if response.status == web.HTTPUnauthorized.status_code:
            response.headers.setdefault(hdrs.WWW_AUTHENTICATE, "Bearer")

    return add


def identify(access: Access, request: web.Request) -> str | None:
    """Return who calls: "local" where no token is needed, "token", or None for a stranger."""
    if not access.token_required:
        return "local"
    expected = _bytes(access.token)
    # All are compared: a wrong password for a proxy may stand beside a right token.
    matches = [hmac.compare_digest(_bytes(shown), expected) for shown in _shown(request)]
    return "token" if any(matches) else None


def serves(access: Access, host: str) -> bool:
    """Tell whether a Host header names this gateway: an address, a local or a served name."""
    split = _split(host)
    if split is None:
        return False
    name = split[0]
    return _address(name) is not None or _is_local_name(name) or name in access.served_names


def redact(path_qs: str) -> str:
    """Return a path and query for a log, with the token (and what is named like one) masked."""
    path, mark, query = path_qs.partition("?")
    parts = re.split(r"([&;#])", query)
    return path + mark + "".join(map(_redact_one, parts))


def _redact_one(part: str) -> str:
    name, equals, value = part.partition("=")
    # aiohttp decodes names, so %74oken is a token as well.
    return f"{name}={MASK}" if equals and value and SECRET_NAME.match(unquote_plus(name)) else part


class _Limits:
    """How often each caller may ask, over a moving window of a minute.

    Each caller has a storage of its own: one for all is swept as a whole after every request,
    with a thread hop per caller, which measured as a whole core at a hundred callers.
    """

    def __init__(self, access: Access, clock: Callable[[], float]) -> None:
        from limits import RateLimitItemPerMinute

        self._access = access
        self._clock = clock
        self._run = RateLimitItemPerMinute(access.rate_limit_run, namespace="run")
        self._general = RateLimitItemPerMinute(access.rate_limit_general, namespace="general")
        self._windows = {OTHERS: self._window()}
        self._seen: dict[str, float] = {}  # the callers, the one who was silent longest first

    async def hit(self, request: web.Request) -> float | None:
        """Count a request; return None, or after how many seconds the next one is allowed."""
        is_run = request.method == hdrs.METH_POST and _path(request).endswith(RUNS)
        item = self._run if is_run else self._general
        window = self._windows[self._admit(_limited_as(self._access, request))]
        if await window.hit(item):
            return None
        stats = await window.get_window_stats(item)
        return min(max(1.0, stats.reset_time - self._clock()), WINDOW_S)

    def _admit(self, caller: str) -> str:
        """Return under whom to count a caller, who is known from here on if there is room."""
        now = self._clock()
        if caller not in self._seen and len(self._seen) >= CALLERS_MAX:
            silent, last = next(iter(self._seen.items()))
            if now - last <= WINDOW_S:
                return OTHERS
            del self._seen[silent], self._windows[silent]
        if caller not in self._windows:
            self._windows[caller] = self._window()
        self._seen.pop(caller, None)
        self._seen[caller] = now
        return caller

    @staticmethod
    def _window() -> "MovingWindowRateLimiter":
        from limits.aio.storage import MemoryStorage
        from limits.aio.strategies import MovingWindowRateLimiter

        return MovingWindowRateLimiter(MemoryStorage())


def _limited_as(access: Access, request: web.Request) -> str:
    """Return which caller a request counts for."""
    if access.behind_proxy:
        return identify(access, request) or "anonymous"
    address = _address(request.remote or "")
    if isinstance(address, ipaddress.IPv6Address):
        # One customer has a whole /64, and could be a new caller for ever.
        return str(ipaddress.IPv6Network((int(address), 64), strict=False))
    return str(address)


def _path(request: web.Request) -> str:
    # As the router reads it, so that no other spelling of a path passes for an open one.
    return request.rel_url.path_safe


def _is_event_stream(request: web.Request) -> bool:
    return request.method == hdrs.METH_GET and _path(request).endswith("/events")


def _reconnects(request: web.Request) -> bool:
    """Tell whether this is an EventSource that comes back: it would give up at a 429."""
    accepts = "text/event-stream" in request.headers.get(hdrs.ACCEPT, "")
    asks = _is_event_stream(request) or (accepts and request.method == hdrs.METH_GET)
    return asks and hdrs.LAST_EVENT_ID in request.headers


def _proxied(request: web.Request) -> bool:
    return any(
        name in ("forwarded", "via") or name.startswith("x-forwarded-")
        for name in map(str.lower, request.headers)
    )


def _shown(request: web.Request) -> list[str]:
    """Return all that the caller shows as a token."""
    shown = list(request.headers.getall("X-API-Key", []))
    for header in request.headers.getall(hdrs.AUTHORIZATION, []):
        scheme, _, value = header.strip().partition(" ")
        if scheme.lower() == "bearer":
            shown.append(value.strip())
    if _is_event_stream(request):
        shown += request.query.getall("token", [])
    return shown


def _bytes(token: str) -> bytes:
    # What is not UTF-8 arrives as lone surrogates, which compare unequal and must not raise.
    return token.encode("utf-8", "surrogatepass")


def _preflight(access: Access, request: web.Request) -> web.Response:
    headers = {}
    if _is_allowed_origin(access, request):
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ALLOW_METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join([ALLOW_HEADERS, *_of_openai(request)]),
            hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_MAX_AGE_S),
        }
    return web.Response(status=204, headers=headers)


def _of_openai(request: web.Request) -> list[str]:
    """Return the headers of OpenAI's clients among those that a preflight asks for."""
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "").lower().split(",")
    return [name for name in map(str.strip, asked) if _OF_OPENAI.fullmatch(name)]


def _origin_of(request: web.Request) -> Origin | None:
    """Return the request's origin; None when there is none that can be trusted."""
    origins = request.headers.getall(hdrs.ORIGIN, [])
    return _parse_origin(origins[0]) if len(origins) == 1 else None


def _is_own_origin(access: Access, request: web.Request) -> bool:
    origin = _origin_of(request)
    # A proxy in front ends TLS, so there a page of ours may be https where the request is http.
    schemes = {"http", "https"} if access.behind_proxy else {request.scheme}
    if origin is None or origin[0] not in schemes:
        return False
    own = _split(request.headers[hdrs.HOST])
    return own is not None and origin == (origin[0], own[0], own[1] or _DEFAULT_PORTS[origin[0]])


def _is_allowed_origin(access: Access, request: web.Request) -> bool:
    origin = _origin_of(request)
    if origin is None:
        return False
    scheme, name, _ = origin
    address = _address(name)
    local = _is_local_name(name) or (address is not None and address.is_loopback)
    return origin in access.allowed_origins or (scheme in _DEFAULT_PORTS and local)


def _parse_origin(text: str) -> Origin | None:
    """Return scheme, host and port of a web origin (RFC 6454, section 6), or None for `null`."""
    found = _ORIGIN.fullmatch(text)
    split = _split(found[2]) if found else None
    if found is None or split is None:
        return None
    scheme = found[1].lower()
    return scheme, split[0], split[1] or _DEFAULT_PORTS.get(scheme)


def _listed_origin(text: str) -> Origin:
    origin = _parse_origin(text.rstrip("/"))
    if origin is None:
        raise BootError(
            f"--cors-origin {text!r} is not an origin like 'https://app.example.com'; "
            "each one must be named, without a path."
        )
    return origin


def _served_name(text: str) -> str:
    split = _split(text)
    if split is None:
        raise BootError(f"--served-name {text!r} is not a host name like 'agents.example.com'.")
    return split[0]


def _split(authority: str) -> tuple[str, int | None] | None:
    """Return host (lower case, no brackets, no final dot) and port; None if it is malformed."""
    found = _AUTHORITY.fullmatch(authority)
    if found is None or int(found[2] or 0) > 65_535:
        return None
    name = found[1].strip("[]").removesuffix(".").lower()
    if not name or (found[1].startswith("[") and _address(name) is None):
        return None
    return name, int(found[2]) if found[2] else None


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a text is, an IPv4 one in IPv6 clothes unwrapped, or None."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
