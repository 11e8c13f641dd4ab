"""Requests to addresses that others choose: what is reached, what is not, and how much is read."""

import asyncio
import gzip
import ipaddress
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import pytest

from ownware_gateway.outbound import (
    HEADERS_MAX,
    REDIRECTS_MAX,
    URL_CHARS_MAX,
    WEB_PORTS,
    Limits,
    NotReached,
    Outbound,
    Policy,
    Refused,
    Request,
    is_own,
    is_public,
)
from tests.provider import Provider
from tests.sites import Names, Site, answer, moved

#: Ways to write, or to lead to, an address that no request may go to; {port} is an open one.
ESCAPES = [
    # Loopback, as it is and in every spelling that some parser understands.
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.255.255.254:{port}/",
    "http://2130706433:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.0.0.01:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0x7F.1:{port}/",
    "http://example.0x7f:{port}/",
    "http://127%2e0%2e0%2e1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://１２７.0.0.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{port}/",
    "http://[fe80::1]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[fd00::1]:{port}/",
    "http://[fec0::1]:{port}/",
    "http://[ff02::1]:{port}/",
    "http://[v1.127.0.0.1]:{port}/",
    # Private networks, metadata services, and what is nobody's.
    "http://10.0.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://192.168.1.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://169.254.169.254:{port}/latest/meta-data/",
    "http://168.63.129.16:{port}/",
    "http://192.0.0.192:{port}/",
    "http://198.18.0.1:{port}/",
    "http://224.0.0.1:{port}/",
    "http://240.0.0.1:{port}/",
    "http://255.255.255.255:{port}/",
    # Names.
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://loopback.example:{port}/",
    "http://mapped.example:{port}/",
    "http://metadata.example:{port}/",
    "http://scoped.example:{port}/",
    "http://mixed.example:{port}/",
    # Hosts that are not where they seem to be.
    "http://public.example@127.0.0.1:{port}/",
    "http://user:pw@public.example:{port}/",
    "http://@127.0.0.1:{port}/",
    "http://public.example:80@127.0.0.1:{port}/",
    "http://public.example\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@public.example/",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1:{port}/\r\nHost: public.example",
    "http://public.example:{port}/ HTTP/1.1\r\nX: y",
    "http://public.example\x00.127.0.0.1:{port}/",
    "http://public.example%00@127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://:{port}/",
    "http://[::1:{port}/",
    # Other schemes and ports.
    "file:" + "///etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_x",
    "ws://127.0.0.1:{port}/",
    "data:text/plain,hello",
    "unix:///run/docker.sock",
    "http://public.example:22/",
    "http://public.example:0/",
    "http://public.example:65536/",
]

#: Shorter limits, so that what never ends is over soon.
BRIEF = Limits(bytes_max=10_000, total_s=0.5, silence_s=0.3)


def names() -> Names:
    return Names(
        localhost=[["127.0.0.1"]],
        loopback_example=[["127.0.0.1"]],
        mapped_example=[["::ffff:127.0.0.1"]],
        metadata_example=[["169.254.169.254"]],
        scoped_example=[["fe80::1%lo"]],
        # One good address does not make up for a bad one, wherever it stands.
        mixed_example=[["127.0.0.2", "127.0.0.1"]],
        public_example=[["127.0.0.2"]],
        other_example=[["127.0.0.2"]],
    )


@pytest.fixture
async def private() -> AsyncIterator[Site]:
    """A server where no request may go, and which would notice one."""
    async with Site() as site:
        site.pages["/"] = answer("secret")
        yield site


@pytest.fixture
async def public(private: Site) -> AsyncIterator[Site]:
    """A server that stands for the public ones: on the same port, at an address that is allowed."""
    site = Site("127.0.0.2")
    site.port = private.port
    try:
        async with site:
            yield site
    except OSError:
        pytest.skip("this system has one loopback address alone")


def policy(site: Site) -> Policy:
    """Allow the one address that stands for the public ones, and the port of both servers."""
    return Policy(ports=frozenset({site.port}), networks=(ipaddress.ip_network("127.0.0.2/32"),))


async def fetch(
    site: Site,
    url: str,
    *,
    limits: Limits = BRIEF,
    resolver: Names | None = None,
    request: Request | None = None,
) -> tuple[bytes, bool]:
    async with (
        Outbound(policy(site), limits, resolver or names()) as outbound,
        outbound.open(request or Request(url)) as response,
    ):
        return await outbound.read(response)


# Where requests go


@pytest.mark.parametrize("url", ESCAPES)
async def test_no_spelling_of_an_address_leads_where_no_request_may_go(
    url: str, private: Site
) -> None:
    with pytest.raises(Refused):
        await fetch(private, url.format(port=private.port))
    assert private.connections == 0


@pytest.mark.parametrize("url", ESCAPES)
async def test_no_redirect_leads_where_no_request_may_go(
    url: str, private: Site, public: Site
) -> None:
    if "\r\n" in url or "\x00" in url:
        pytest.skip("no header can hold it")
    public.pages["/"] = moved(url.format(port=private.port))
    with pytest.raises(Refused):
        await fetch(public, f"http://public.example:{public.port}/")
    assert (public.connections, private.connections) == (1, 0)


@pytest.mark.parametrize("url", ESCAPES)
async def test_the_client_itself_connects_nowhere_else_when_nobody_looked_at_the_address(
    url: str, private: Site, public: Site
) -> None:
    public.pages["/"] = moved(url.format(port=private.port))
    async with Outbound(policy(public), BRIEF, names()) as outbound:
        for asked in (url.format(port=private.port), f"http://public.example:{public.port}/"):
            with suppress(Refused, aiohttp.ClientError, ValueError):
                async with outbound.session().get(asked):
                    pass
    assert private.connections == 0


async def test_what_is_allowed_is_reached(public: Site) -> None:
    public.pages["/"] = answer("welcome")
    assert await fetch(public, f"http://127.0.0.2:{public.port}/") == (b"welcome", True)
    assert await fetch(public, f"http://public.example:{public.port}/#part") == (b"welcome", True)
    assert await fetch(public, f"http://PUBLIC.example.:{public.port}") == (b"welcome", True)
    assert [visit.line for visit in public.visits] == ["GET / HTTP/1.1"] * 3


async def test_a_name_that_leads_elsewhere_the_second_time_is_not_followed_there(
    private: Site, public: Site
) -> None:
    public.pages["/"] = answer("first", Connection="close")
    turning = Names(turning_example=[["127.0.0.2"], ["127.0.0.1"]])
    url = f"http://turning.example:{public.port}/"
    async with Outbound(policy(public), BRIEF, turning) as outbound:
        async with outbound.open(Request(url)) as response:
            assert await outbound.read(response) == (b"first", True)
        # Looked up once, and connected to what was looked at.
        assert turning.lookups == ["turning.example"]
        with pytest.raises(Refused, match=r"turning\.example leads to 127\.0\.0\.1"):
            async with outbound.open(Request(url)):
                pass
    assert (public.connections, private.connections) == (1, 0)


async def test_a_redirect_to_the_same_name_is_looked_up_and_checked_anew(
    private: Site, public: Site
) -> None:
    public.pages["/"] = answer(status=302, Location="/next", Connection="close")
    turning = Names(turning_example=[["127.0.0.2"], ["127.0.0.1"]])
    with pytest.raises(Refused):
        await fetch(public, f"http://turning.example:{public.port}/", resolver=turning)
    assert (public.connections, private.connections) == (1, 0)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "192.0.1.1", "223.255.255.255"),
        *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"),
    ],
)
def test_a_public_address_is_known_as_one(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.1.2.3", "10.255.255.255", "100.64.0.0", "100.127.255.255", "127.0.0.1", "169.254.0.1"),
        *("172.31.255.255", "192.0.0.9", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.19.0.1"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.251", "239.255.255.250", "255.255.255.255"),
        *("::", "::1", "::2", "::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "100::1"),
        *("2001::1", "2001:db8::1", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fe80::1"),
        *("fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "ff0e::1"),
    ],
)
def test_an_address_that_is_not_public_is_known_as_one(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


def test_nothing_is_public_that_python_calls_private() -> None:
    for first in range(256):
        for second in (0, 18, 31, 51, 64, 88, 127, 168, 254):
            address = ipaddress.IPv4Address(f"{first}.{second}.100.5")
            if is_public(address):
                assert address.is_global
                assert not address.is_multicast


def test_a_machine_knows_its_own_addresses() -> None:
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert not is_own(ipaddress.ip_address("192.0.2.1"))


# What a policy names


async def test_a_host_that_the_operator_names_is_reached_at_its_port_alone(private: Site) -> None:
    named = Policy.naming([f"loopback.example:{private.port}"])
    async with Outbound(named, BRIEF, names()) as outbound:
        async with outbound.open(Request(f"http://loopback.example:{private.port}/")) as response:
            assert await outbound.read(response) == (b"secret", True)
        for other in (
            f"http://127.0.0.1:{private.port}/",
            f"http://localhost:{private.port}/",
            "http://loopback.example/",
        ):
            with pytest.raises(Refused):
                async with outbound.open(Request(other)):
                    pass
    assert private.connections == 1


@pytest.mark.parametrize(
    ("entry", "url", "address"),
    [
        ("10.0.0.0/8", "http://10.1.2.3/", "10.1.2.3"),
        ("10.1.2.3", "https://10.1.2.3/", "10.1.2.3"),
        ("10.0.0.0/8", "http://wiki.example/", "10.1.2.3"),
        ("10.0.0.0/8", "http://wiki.example/", "::ffff:10.1.2.3"),
        ("fd00::/8", "http://[fd00::1]/", "fd00::1"),
        ("::1", "http://[::1]/", "::1"),
        ("[::1]:3000", "http://[0::1]:3000/", "::1"),
        ("wiki.example", "https://wiki.example/", "10.1.2.3"),
        ("Wiki.example.:3000", "http://wiki.example:3000/", "10.1.2.3"),
        ("wiki.example:3000", "http://wiki.example.:3000/", "10.1.2.3"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/", "127.0.0.1"),
    ],
)
def test_what_an_operator_writes_is_allowed(entry: str, url: str, address: str) -> None:
    named = Policy.naming([entry])
    checked = named.check(url)
    assert checked.host
    assert checked.port
    assert named.permits(checked.host, checked.port, ipaddress.ip_address(address))
    assert not named.permits("else.example", 3000, ipaddress.ip_address("192.168.0.1"))
    with pytest.raises(Refused):
        Policy().check_address(checked.host, checked.port, ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "entry",
    ["", "10.0.0.1/8", "http://wiki.example", "a b", "wiki.example:x", "127.1", "u@wiki.example"],
)
def test_what_is_no_place_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a network, an address or a host:port"):
        Policy.naming([entry])


def test_the_ports_of_the_web_are_open_and_no_others() -> None:
    for port in WEB_PORTS:
        assert Policy().check(f"http://example.com:{port}/").port == port
    address = ipaddress.ip_address("1.1.1.1")
    assert Policy().permits("example.com", 443, address)
    # The socket asks this, whoever looked at the URL.
    assert not Policy().permits("example.com", 6379, address)
    with pytest.raises(Refused, match=r"Port 6379 of example\.com is not open"):
        Policy().check("http://example.com:6379/")


def test_an_address_without_end_is_refused() -> None:
    with pytest.raises(Refused, match=str(URL_CHARS_MAX)):
        Policy().check("http://example.com/" + "x" * URL_CHARS_MAX)


def test_a_name_in_any_script_is_spelled_in_its_one_way() -> None:
    assert str(Policy().check("HTTPS://例え.JP/ä#x")) == "https://xn--r8jz45g.jp/%C3%A4"


# Redirects and headers


@pytest.mark.parametrize("to", ["/end", "end", "//other.example:{port}/end", "end?a b"])
async def test_a_redirect_is_followed(to: str, public: Site) -> None:
    public.pages["/"] = moved(to.format(port=public.port))
    public.pages["/end"] = answer("here")
    assert (await fetch(public, f"http://public.example:{public.port}/"))[0] == b"here"


async def test_redirects_come_to_an_end(public: Site) -> None:
    for number in range(20):
        public.pages[f"/{number}"] = moved(f"/{number + 1}")
    public.pages["/20"] = answer("far")
    with pytest.raises(NotReached, match=f"more than {REDIRECTS_MAX} times"):
        await fetch(public, f"http://public.example:{public.port}/0")
    assert len(public.visits) == REDIRECTS_MAX + 1


async def test_headers_of_a_request_stay_with_its_origin(public: Site) -> None:
    public.pages["/"] = moved("/same")
    public.pages["/same"] = moved(f"http://other.example:{public.port}/other")
    public.pages["/other"] = answer("done")
    url = f"http://public.example:{public.port}/"
    await fetch(public, url, request=Request(url, headers={"Authorization": "Bearer of-a-test"}))
    assert ["Authorization" in visit.headers for visit in public.visits] == [True, True, False]


async def test_a_body_of_a_get_stays_with_its_origin_too(public: Site) -> None:
    public.pages["/"] = moved(f"http://other.example:{public.port}/other")
    public.pages["/other"] = answer("done")
    url = f"http://public.example:{public.port}/"
    await fetch(public, url, request=Request(url, body=b"words"))
    assert [visit.body for visit in public.visits] == [b"words", b""]


async def test_a_body_is_not_sent_on_to_where_a_redirect_points(public: Site) -> None:
    public.pages["/"] = moved("/else", status=307)
    request = Request(f"http://public.example:{public.port}/", method="POST", body=b"words")
    async with (
        Outbound(policy(public), BRIEF, names()) as outbound,
        outbound.open(request) as response,
    ):
        assert response.status == 307
    assert [visit.body for visit in public.visits] == [b"words"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-A", "a\r\nX-B: b"),
        ("X-A", "a\nb"),
        ("X-A", "a\x00b"),
        ("X-A\r\nX-B", "b"),
        ("X-A: x", "b"),
        ("", "b"),
        ("Host", "127.0.0.1"),
        ("Content-Length", "1"),
        ("transfer-encoding", "chunked"),
        ("Connection", "upgrade"),
    ],
)
async def test_no_header_can_carry_another_or_move_the_request(
    name: str, value: str, public: Site
) -> None:
    url = f"http://public.example:{public.port}/"
    with pytest.raises(Refused):
        await fetch(public, url, request=Request(url, headers={name: value}))
    assert public.connections == 0


async def test_cookies_are_not_kept(public: Site) -> None:
    public.pages["/"] = answer("one", Set_Cookie="seen=1; Path=/")
    async with Outbound(policy(public), BRIEF, names()) as outbound:
        for _ in range(2):
            async with outbound.open(Request(f"http://public.example:{public.port}/")) as response:
                await outbound.read(response)
    assert ["Cookie" in visit.headers for visit in public.visits] == [False, False]


async def test_a_proxy_of_the_environment_is_not_used(
    private: Site, public: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    public.pages["/"] = answer("direct")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, private.url)
    assert (await fetch(public, f"http://public.example:{public.port}/"))[0] == b"direct"
    assert private.connections == 0


# What is read


class Endless:
    """A page that goes on until its reader leaves, as fast as that reads."""

    def __init__(self, piece: bytes, head: bytes = b"\r\n") -> None:
        self._head, self._piece = b"HTTP/1.1 200 OK\r\n" + head, piece
        self.left = asyncio.Event()

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        writer.write(self._head)
        try:
            while True:
                writer.write(self._piece)
                await writer.drain()
                # The other side of the connection is in this very loop.
                await asyncio.sleep(0)
        finally:
            self.left.set()


async def test_a_body_without_end_is_read_up_to_the_limit(public: Site) -> None:
    page = Endless(b"x" * 1000)
    public.pages["/"] = page
    body, whole = await fetch(public, f"http://public.example:{public.port}/")
    assert (body, whole) == (b"x" * BRIEF.bytes_max, False)
    async with asyncio.timeout(10):
        await page.left.wait()


async def test_a_body_that_dribbles_is_given_up_when_the_time_is_over(public: Site) -> None:
    async def dribble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    public.pages["/"] = dribble
    with pytest.raises(NotReached, match=r"public\.example took longer than 0\.1 s\."):
        await fetch(public, f"http://public.example:{public.port}/", limits=Limits(total_s=0.1))


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_a_server_that_falls_silent_is_given_up(sent: bytes, public: Site) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await asyncio.Event().wait()

    public.pages["/"] = hang
    limits = Limits(silence_s=0.05)
    with pytest.raises(NotReached, match=r"public\.example sent nothing for 0\.05 s\."):
        await fetch(public, f"http://public.example:{public.port}/", limits=limits)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_bomb_is_not_unpacked(encoding: str, public: Site) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    public.pages["/"] = answer(bomb, Content_Encoding=encoding)
    tracemalloc.start()
    try:
        body, whole = await fetch(public, f"http://public.example:{public.port}/")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (body, whole) == (bytes(BRIEF.bytes_max), False)
    assert peak_bytes < 8 * 2**20


async def test_a_bomb_that_unpacks_to_nothing_for_ever_is_given_up(public: Site) -> None:
    empty = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = empty.compress(b"") + empty.flush(zlib.Z_SYNC_FLUSH)
    public.pages["/"] = Endless(
        b"\x00\x00\x00\xff\xff" * 100, b"Content-Encoding: gzip\r\n\r\n" + head
    )
    with pytest.raises(NotReached):
        await fetch(public, f"http://public.example:{public.port}/", limits=Limits(total_s=0.1))


async def test_what_is_compressed_is_read(public: Site) -> None:
    public.pages["/"] = answer(gzip.compress(b"text " * 100), Content_Encoding="gzip")
    body = await fetch(public, f"http://public.example:{public.port}/")
    assert body == (b"text " * 100, True)
    assert public.visits[0].headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * (HEADERS_MAX + 2) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"",
    ],
    ids=["long header", "many headers", "length", "not gzip", "not HTTP", "nothing"],
)
async def test_an_answer_that_is_not_as_it_should_be_is_said_to_be(
    response: bytes, public: Site
) -> None:
    async def page(writer: asyncio.StreamWriter) -> None:
        writer.write(response)
        await writer.drain()

    public.pages["/"] = page
    with pytest.raises(NotReached, match=r"^public\.example did not answer as HTTP should"):
        await fetch(public, f"http://public.example:{public.port}/")


async def test_a_server_without_tls_is_not_trusted(provider: Provider) -> None:
    address = provider.url.removeprefix("http://")
    async with Outbound(Policy.naming([address])) as outbound:
        with pytest.raises(NotReached, match=r"^127\.0\.0\.1 speaks no TLS that can be trusted"):
            async with outbound.open(Request(f"https://{address}/")):
                pass


async def test_a_redirect_that_is_refused_says_who_sent_it(public: Site) -> None:
    public.pages["/"] = moved("http://10.0.0.1/")
    with pytest.raises(Refused, match=r"^public\.example redirects to where no request may go\. "):
        await fetch(public, f"http://public.example:{public.port}/")


async def test_a_server_that_is_not_there_is_named(public: Site) -> None:
    port = public.port
    await public.__aexit__()
    with pytest.raises(NotReached, match=r"^public\.example cannot be reached: "):
        await fetch(public, f"http://public.example:{port}/")
    with pytest.raises(NotReached, match=r"^The name nowhere\.example leads to no address\.$"):
        await fetch(public, f"http://nowhere.example:{port}/")


async def test_a_reader_that_is_cancelled_hangs_up(public: Site) -> None:
    page = Endless(b".")
    public.pages["/"] = page
    unbounded = Limits(bytes_max=2**40)
    reading = asyncio.ensure_future(
        fetch(public, f"http://public.example:{public.port}/", limits=unbounded)
    )
    while not public.visits:
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(10):
        await page.left.wait()


# -- requests that are built by others


async def test_a_target_is_sent_as_it_is_written() -> None:
    async with Site() as site, Outbound(Policy.naming([f"127.0.0.1:{site.port}"])) as outbound:
        target = "/a%2e%2e/%2E%2E/b%3Bc%2Fd?x=%2B&y=%5B"
        async with outbound.open(Request(f"{site.url}/other?q=1", target=target)):
            pass
        assert site.visits[0].line == f"GET {target} HTTP/1.1"
        for wrong in (
            "//evil.example/ x",
            "a",
            "/a\r\nX: y",
            "/é",
            "/a#b",
            "/a\\b",
            "/" + "a" * 5000,
        ):
            with pytest.raises(Refused):
                async with outbound.open(Request(site.url, target=wrong)):
                    pass
    assert len(site.visits) == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
async def test_a_request_of_once_is_not_sent_again_when_its_connection_breaks(method: str) -> None:
    async def leave(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with Site() as site, Outbound(Policy.naming([f"127.0.0.1:{site.port}"])) as outbound:
        site.pages["/"] = leave
        with pytest.raises(NotReached, match="broke off the connection"):
            async with outbound.open(Request(site.url, method, once=True)):
                pass
        assert len(site.visits) == 1


async def test_what_is_never_reached_is_not_even_where_a_host_is_named() -> None:
    async with Site() as site:
        named = frozenset({("shop.example", site.port), ("127.0.0.1", site.port)})
        never = (ipaddress.ip_network("127.0.0.0/8"),)
        names = Names(shop_example=[["127.0.0.1"]])
        async with Outbound(Policy(hosts=named, never=never), resolver=names) as outbound:
            for host in ("shop.example", "127.0.0.1"):
                with pytest.raises(Refused, match="not a public address"):
                    async with outbound.open(Request(f"http://{host}:{site.port}/")):
                        pass
        assert site.connections == 0
