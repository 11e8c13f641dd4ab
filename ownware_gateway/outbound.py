"""Requests to addresses that somebody else chose: never into a private network, and never endless.

A model, a page that redirects or a document names the address, so it is checked at each of three
places: the URL itself, every address that its name resolves to, and the socket before it connects.
A name is looked up once for each connection, which goes to one of the very addresses that were
checked, so a name server that answers differently the second time is not asked a second time.

What may be reached is public addresses (the registries are
https://www.iana.org/assignments/iana-ipv4-special-registry and
https://www.iana.org/assignments/iana-ipv6-special-registry) and what a `Policy` names.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, Self

import aiohttp
from aiohttp import ClientHandlerType
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.typedefs import StrOrURL
from yarl import URL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
AddressInfo = tuple[
    int | socket.AddressFamily,
    int | socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]

#: Ports of the web. Others speak protocols that may take a request for something else, and are
#: open only where a policy names host and port.
WEB_PORTS: Final = frozenset({80, 443, 8080, 8443})

URL_CHARS_MAX: Final = 4096
REDIRECTS_MAX: Final = 5

#: Addresses of one name that are looked at, and tried.
ADDRESSES_MAX: Final = 16

#: Connections that one `Outbound` has open at the same time, and how long an idle one is kept.
CONNECTIONS_MAX: Final = 64
KEEP_ALIVE_S: Final = 15.0

HEADER_LINE_BYTES_MAX: Final = 8190
HEADERS_MAX: Final = 128

#: IPv4 that is not public, beside it what some cloud's machines reach its control plane at.
_NOT_PUBLIC_V4: Final = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        ),
    )
)

#: All public IPv6 is in here, and what else is in here is below: protocol assignments with Teredo,
#: documentation, 6to4.
_UNICAST_V6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_V6: Final = tuple(
    map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
)

#: How networks without IPv4 reach it (RFC 6052): the last 32 bits are the real address.
_NAT64: Final = IPv6Network("64:ff9b::/96")

#: Control characters and spaces split a request line; parsers differ about a backslash.
_NOT_IN_URL: Final = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
_NOT_IN_TARGET: Final = re.compile(r"[^!-~]|[#\\]")
_NAME: Final = re.compile(r"(?:[a-z0-9_-]{1,63}\.){0,126}[a-z0-9_-]{1,63}\.?")

#: A name whose last label is a number is an IPv4 address in one of its old spellings
#: (https://url.spec.whatwg.org/#ends-in-a-number-checker).
_NUMERIC: Final = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\.?")

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\uffff]*")

#: Headers that say where a request goes and where it ends; only the HTTP client sets them.
_OWN_HEADERS: Final = frozenset(
    {
        *("host", "connection", "content-length", "expect", "keep-alive", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class NotReached(Exception):
    """A request came to nothing; the message is a sentence for whoever chose the address."""


class Refused(NotReached):
    """The policy does not allow this request; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Where requests may go: to public addresses, on `ports`, and to what is named here.

    `networks` may be reached although they are private, on `ports`. `hosts` are names or addresses
    with a port that may be reached wherever their name leads, `never` excepted.
    """

    schemes: frozenset[str] = frozenset({"http", "https"})
    ports: frozenset[int] = WEB_PORTS
    networks: tuple[Network, ...] = ()
    hosts: frozenset[tuple[str, int]] = frozenset()
    never: tuple[Network, ...] = ()

    @classmethod
    def naming(cls, entries: Iterable[str]) -> Self:
        """Return the policy that allows these private places, as an operator writes them.

        An entry is a network or an address (`10.0.0.0/8`, `::1`), a host with a port
        (`wiki.example:3000`, `[::1]:3000`), or a host alone, which is open on the web's ports.
        Raises ValueError that says which entry is none of them.
        """
        networks: list[Network] = []
        hosts: set[tuple[str, int]] = set()
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                hosts |= _named(entry)
        return cls(networks=tuple(networks), hosts=frozenset(hosts))

    def check(self, text: str) -> URL:
        """Return the URL that a text is. Raises Refused when no request may go there.

        A name is looked at no further than its spelling: where it leads is checked on the way.
        """
        url = _parsed(text)
        if url.scheme not in self.schemes:
            wanted = " and ".join(f"{name}://" for name in sorted(self.schemes))
            raise Refused(f"Only {wanted} addresses can be asked, not {url.scheme[:20]!r}.")
        host, port = _host(url), url.port
        assert port is not None
        if port not in self.ports and (_bare(host), port) not in self.hosts:
            ports = ", ".join(map(str, sorted(self.ports)))
            raise Refused(f"Port {port} of {host} is not open to requests; these are: {ports}.")
        if (address := _literal(host)) is not None:
            self.check_address(host, port, address)
        return url

    def check_address(self, host: str, port: int, address: Address) -> None:
        """Raise Refused unless the host may be reached at this address and port."""
        if not self.permits(host, port, address):
            where = host if _literal(host) else f"{host} leads to {address}, which"
            raise Refused(f"{where} is not a public address; requests go to no others.")

    def permits(self, host: str, port: int, address: Address) -> bool:
        """Whether the host may be reached at this address and port."""
        plain = _plain(address)
        if any(item in network for item in (address, plain) for network in self.never):
            return False
        if (_bare(host), port) in self.hosts:
            return True
        if port not in self.ports:
            return False
        return is_public(address) or any(plain in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one exchange may take, redirects and the reading of the body included.

    `bytes_max` counts the body before and after it is decompressed. A `total_s` of None is for
    streams that stay open; `silence_s` is the time without a byte. Where `redirects_max` is 0, a
    redirect is an answer like any other.
    """

    bytes_max: int = 2 * 1024 * 1024
    total_s: float | None = 30.0
    connect_s: float = 10.0
    silence_s: float = 20.0
    redirects_max: int = REDIRECTS_MAX


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. Only GET and HEAD follow redirects.

    `headers` and `body` go to the origin of `url` alone, and to nowhere that it redirects to. A
    `target` is the path and query in place of the URL's, sent as it is: no `..` in it is resolved
    and no escape is undone. A request of `once` is not repeated when its connection breaks,
    whatever its method.
    """

    url: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    target: str | None = field(default=None, repr=False)
    once: bool = False


class Outbound:
    """Connections under one policy: `async with Outbound(policy) as outbound:`.

    `resolver` is how names are looked up; None asks the operating system. Proxies, netrc files and
    cookies are never used.
    """

    def __init__(
        self,
        policy: Policy = Policy(),
        limits: Limits = Limits(),
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def session(self) -> aiohttp.ClientSession:
        """Return the HTTP client, for who needs more of it than `open`.

        It connects to nothing that the policy does not permit, whatever it is asked for and
        wherever a redirect points.
        """
        if self._session is None:
            guard = _Guard(self._policy, self._resolver or aiohttp.ThreadedResolver())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=guard,
                    socket_factory=guard.socket,
                    # A kept answer would be an address that nobody checked for this connection.
                    use_dns_cache=False,
                    limit=CONNECTIONS_MAX,
                    keepalive_timeout=KEEP_ALIVE_S,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._limits.connect_s,
                    sock_read=self._limits.silence_s,
                ),
                max_line_size=HEADER_LINE_BYTES_MAX,
                max_field_size=HEADER_LINE_BYTES_MAX,
                max_headers=HEADERS_MAX,
            )
        return self._session

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, follow its redirects, and yield the response, its body not yet read.

        Raises Refused, or NotReached for what went wrong on the way or while the body was read.
        """
        _check_headers(request.headers)
        url = _aimed(self._policy.check(request.url), request.target)
        try:
            async with asyncio.timeout(self._limits.total_s):
                response = await self._follow(request, url)
                try:
                    yield response
                finally:
                    response.close()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _not_reached(url, error, self._limits) from error

    async def read(self, response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
        """Return a response's body, decompressed, and whether that is all of it.

        What is over the limit is not read, nor decompressed.
        """
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            came = max(len(body), response.content.total_compressed_bytes or 0)
            if came > self._limits.bytes_max:
                return bytes(body[: self._limits.bytes_max]), False
        return bytes(body), True

    async def _follow(self, request: Request, url: URL) -> aiohttp.ClientResponse:
        first = url.origin()
        for _ in range(self._limits.redirects_max + 1):
            response = await self._send(request, url, is_first=url.origin() == first)
            where = response.headers.get("Location") if response.status in _REDIRECTS else None
            follows = self._limits.redirects_max and request.method in ("GET", "HEAD")
            if where is None or not follows:
                return response
            response.close()
            url = self._next(url, where)
        raise NotReached(f"{first} redirects more than {self._limits.redirects_max} times.")

    def _next(self, url: URL, where: str) -> URL:
        # Some servers leave spaces in.
        where = where.strip(" ").replace(" ", "%20")
        try:
            # `check` says what is wrong with what joining would repair, in whatever way.
            sound = _NOT_IN_URL.search(where) is None and not re.match(r"[^/?#]+:(?!//[^/])", where)
            return self._policy.check(str(url.join(URL(where))) if sound else where)
        except (Refused, ValueError) as error:
            said = error if isinstance(error, Refused) else "That is not a web address."
            raise Refused(f"{url.host} redirects to where no request may go. {said}") from error

    async def _send(self, request: Request, url: URL, *, is_first: bool) -> aiohttp.ClientResponse:
        headers = {
            "User-Agent": "ownware-gateway",
            # No other decompressor meets what strangers send, even where one is installed.
            "Accept-Encoding": "gzip, deflate",
        }
        try:
            return await self.session().request(
                request.method,
                url,
                headers=headers | (dict(request.headers) if is_first else {}),
                data=request.body if is_first else None,
                allow_redirects=False,
                middlewares=(_once,) if request.once else None,
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _not_reached(url, error, self._limits) from error


class _Broken(aiohttp.ClientError):
    """A connection broke that a request had gone out on; aiohttp repeats nothing after this."""


async def _once(request: aiohttp.ClientRequest, send: ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once: aiohttp would repeat a PUT or DELETE that may have had its effect."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise  # There was no connection yet.
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _Broken from error


class _Guard(AbstractResolver):
    """Lets a connector reach only what a policy permits: by name, and once more by socket."""

    def __init__(self, policy: Policy, resolver: AbstractResolver) -> None:
        self._policy = policy
        self._resolver = resolver
        #: Where the hosts that the policy names lead, which may be anywhere.
        self._named: dict[tuple[str, int], frozenset[str]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a name. Raises Refused unless all of them are permitted."""
        found = (await self._resolver.resolve(host, port, family))[:ADDRESSES_MAX]
        if not found:
            raise OSError(f"{host} has no address")
        for item in found:
            self._policy.check_address(host, port, ip_address(item["host"]))
        if (named := (_bare(host), port)) in self._policy.hosts:
            self._named[named] = frozenset(item["host"] for item in found)
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._resolver.close()

    def socket(self, info: AddressInfo) -> socket.socket:
        """Return a socket that is to be connected to an address. Raises Refused.

        aiohttp does not ask a resolver about an address that stands in the URL itself.
        """
        family, kind, protocol, _, where = info
        host, port = str(where[0]), int(where[1])
        address = ip_address(host)
        named = any(port == at and host in found for (_, at), found in self._named.items())
        if not named:
            self._policy.check_address(str(address), port, address)
            if is_public(address) and is_own(address):
                raise Refused(f"{host} is this machine itself; requests go to others alone.")
        return socket.socket(family, kind, protocol)


def is_public(address: Address) -> bool:
    """Whether anybody on the internet may have this address, and so no private network has it."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if isinstance(plain := _plain(address), IPv4Address):
            return is_public(plain)
        return address in _UNICAST_V6 and not any(address in net for net in _NOT_PUBLIC_V6)
    return not any(address in net for net in _NOT_PUBLIC_V4)


def is_own(address: Address) -> bool:
    """Whether this machine has the address, which may be a public one; nothing is sent."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # To reach itself a machine sends from the very address that it sends to.
            probe.connect((str(address), 9))
            return ip_address(probe.getsockname()[0]) == address
    except OSError:  # There is no way there.
        return False


def _plain(address: Address) -> Address:
    """Return the IPv4 address that is written as an IPv6 one and reached through it, or itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _named(entry: str) -> set[tuple[str, int]]:
    try:
        if "/" in entry:
            raise ValueError
        url = _parsed(f"http://{entry}")
        host = _bare(_host(url))
    except (Refused, ValueError):
        raise ValueError(f"{entry!r} is not a network, an address or a host:port") from None
    ports = WEB_PORTS if url.explicit_port is None else {url.explicit_port}
    return {(host, port) for port in ports}


def _parsed(text: str) -> URL:
    if len(text) > URL_CHARS_MAX:
        raise Refused(f"The address is longer than {URL_CHARS_MAX} characters.")
    if _NOT_IN_URL.search(text):
        raise Refused("The address holds a space, a backslash or a control character.")
    if "@" in re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]:
        raise Refused("The address holds a name or a password before an @; none is ever sent.")
    try:
        url = URL(text)
    except (ValueError, UnicodeError) as error:
        raise Refused("That is not a web address.") from error
    if not url.raw_host:
        raise Refused("The address names no host; one begins like https://example.com.")
    return url.with_fragment(None)


def _aimed(url: URL, target: str | None) -> URL:
    """Return the URL with another path and query, exactly as they are written. Raises Refused."""
    if target is None:
        return url
    if len(target) > URL_CHARS_MAX:
        raise Refused(f"The path and query are longer than {URL_CHARS_MAX} characters.")
    if _NOT_IN_TARGET.search(target) or not target.startswith("/"):
        raise Refused("The path or query holds a character that must be written as an escape.")
    path, _, query = target.partition("?")
    return URL.build(
        scheme=url.scheme, authority=url.raw_authority, path=path, query_string=query, encoded=True
    )


def _host(url: URL) -> str:
    """Return the host of a URL, spelled in the one way that it has. Raises Refused."""
    host = url.raw_host or ""
    if url.raw_authority.startswith("["):
        try:
            return str(IPv6Address(host if "%" not in host else ""))
        except ValueError:
            raise Refused(f"[{host}] is not an IPv6 address that can be asked.") from None
    if not _NAME.fullmatch(host):
        raise Refused(f"{host[:100]!r} is not the name of a host.")
    if _NUMERIC.fullmatch(host.rstrip(".").rpartition(".")[2]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise Refused(
                f"{host} is not how an IPv4 address is written; that is like 192.0.2.1."
            ) from None
    return host


def _bare(host: str) -> str:
    return host.removesuffix(".")


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _check_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise Refused(f"{name[:50]!r} cannot be a header of this request.")
        if not _HEADER_VALUE.fullmatch(value):
            raise Refused(f"The header {name} holds a line break or a control character.")


def _not_reached(url: StrOrURL, error: Exception, limits: Limits) -> NotReached:
    host = URL(url).host
    match error:
        case aiohttp.ClientConnectorDNSError():
            said = f"The name {host} leads to no address."
        case aiohttp.ClientConnectorCertificateError():
            said = f"{host} did not prove who it is: {error.certificate_error}."
        case aiohttp.ClientSSLError():
            said = f"{host} speaks no TLS that can be trusted."
        case aiohttp.ClientConnectorError():
            said = f"{host} cannot be reached: {(error.strerror or 'no connection').lower()}."
        case aiohttp.ServerTimeoutError():
            said = f"{host} sent nothing for {limits.silence_s:g} s."
        case TimeoutError() if limits.total_s is not None:
            said = f"{host} took longer than {limits.total_s:g} s."
        case _Broken():
            said = f"{host} broke off the connection."
        case _:
            said = f"{host} did not answer as HTTP should ({type(error).__name__})."
    return NotReached(said)
