import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import test_utils

from ownware_gateway.models import OVERFLOW, ModelError
from ownware_gateway.models.http import (
    ERROR_BYTES_MAX,
    EVENT_BYTES_MAX,
    SAID_LENGTH_MAX,
    Endpoint,
    Pool,
    reported,
)
from tests.provider import Provider, Reply, sse

KEY = "sk-" + "a" * 24
DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    await pool.close()


def endpoint(provider: Provider, *, silence_s: float = 5.0) -> Endpoint:
    return Endpoint(
        "openai",
        f"{provider.base_url}/chat/completions",
        {"Authorization": f"Bearer {KEY}"},
        silence_s,
        "OPENAI_API_KEY",
    )


BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi."}]}


async def read(pool: Pool, endpoint: Endpoint, body: dict[str, Any] | None = None) -> list[bytes]:
    async with aclosing(pool.stream(endpoint, body or BODY)) as reads:
        return [payload async for payloads in reads for payload in payloads]


async def failure(pool: Pool, endpoint: Endpoint) -> ModelError:
    with pytest.raises(ModelError) as raised:
        await read(pool, endpoint)
    assert KEY not in raised.value.message
    assert raised.value.code == "provider_error"
    return raised.value


async def test_the_body_is_posted_as_json_with_the_headers_of_the_endpoint(
    provider: Provider, pool: Pool
) -> None:
    await read(pool, endpoint(provider))
    (asked,) = provider.requests
    assert asked.body == BODY
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.headers["Accept"] == "text/event-stream"


async def test_a_body_of_many_megabytes_arrives(provider: Provider, pool: Pool) -> None:
    provider.reply(Reply(text=["read"]))
    body = {"model": "m", "messages": [{"role": "user", "content": "long " * 2**20}]}
    await read(pool, endpoint(provider), body)
    assert provider.requests[0].body == body


@pytest.mark.parametrize(
    ("stream", "payloads"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"event: message\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b": a comment\n\n:\n\ndata: a\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a\n\ndata: unfinished\n", [b"a"]),
        (b"data: a\n\ndata: unfini", [b"a"]),
        (b"data: a\n\ndata: [DONE]\n\ndata: b\n\n", [b"a"]),
        (b"data:\n\ndata: a\n\n", [b"a"]),
        ("data: grüße, 你好\n\n".encode(), ["grüße, 你好".encode()]),
        (b"", []),
    ],
)
async def test_an_event_stream_is_cut_into_the_data_of_its_events(
    provider: Provider, pool: Pool, stream: bytes, payloads: list[bytes]
) -> None:
    provider.reply(Reply(body=stream))
    assert await read(pool, endpoint(provider)) == payloads


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_an_event_may_be_split_between_packets_anywhere(
    provider: Provider, pool: Pool, newline: bytes
) -> None:
    stream = b"data: one" + 2 * newline + b": c" + 2 * newline + b"data: two" + 2 * newline
    for cut in range(1, len(stream)):
        provider.reply(Reply(body=[stream[:cut], stream[cut:]], delay_s=0.001))
        assert await read(pool, endpoint(provider)) == [b"one", b"two"]


async def test_events_of_one_packet_come_as_one_list(provider: Provider, pool: Pool) -> None:
    gate = asyncio.Event()
    body = [sse(1, 2, 3), sse(4), sse(b"[DONE]")]
    provider.reply(Reply(body=body, gate=gate, gate_after=1))
    async with aclosing(pool.stream(endpoint(provider), BODY)) as reads:
        assert await anext(reads) == [b"1", b"2", b"3"]
        gate.set()
        assert await anext(reads) == [b"4"]


async def test_an_event_larger_than_the_limit_is_refused(provider: Provider, pool: Pool) -> None:
    provider.reply(Reply(body=b"data: " + b"x" * (EVENT_BYTES_MAX + 1)))
    error = await failure(pool, endpoint(provider))
    assert str(EVENT_BYTES_MAX) in error.message
    assert error.retry is None


async def test_an_event_just_within_the_limit_is_read(provider: Provider, pool: Pool) -> None:
    data = b"x" * (EVENT_BYTES_MAX - 100)
    provider.reply(Reply(body=b"data: " + data + b"\n\n"))
    assert await read(pool, endpoint(provider)) == [data]


@pytest.mark.parametrize("hang_after", [-1, 0, 1])
async def test_a_provider_that_falls_silent_is_given_up(
    provider: Provider, pool: Pool, hang_after: int
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], hang=True, hang_after=hang_after))
    error = await failure(pool, endpoint(provider, silence_s=0.1))
    assert error.message == "Nothing came from openai for 0.1 s; it was given up."
    assert error.retry == "connection"
    await provider.left()


async def test_a_slow_provider_is_not_a_silent_one(provider: Provider, pool: Pool) -> None:
    provider.reply(Reply(text="abcdefgh", delay_s=0.05))
    payloads = await read(pool, endpoint(provider, silence_s=0.3))
    assert len(payloads) > 8


@pytest.mark.parametrize("cut_after", [-1, 0, 1])
async def test_a_connection_cut_by_the_provider_may_be_tried_again(
    provider: Provider, pool: Pool, cut_after: int
) -> None:
    provider.reply(Reply(text=["Hel", "lo"], cut_after=cut_after))
    error = await failure(pool, endpoint(provider))
    assert error.message == "The connection to openai was cut off."
    assert error.retry == "connection"


async def test_a_provider_that_is_not_there_is_named_with_its_address(pool: Pool) -> None:
    port = test_utils.unused_port()
    error = await failure(pool, Endpoint("ollama", f"http://user:pw@127.0.0.1:{port}/v1", {}))
    assert error.message.startswith(f"ollama cannot be reached at 127.0.0.1:{port}: connection ref")
    assert error.retry == "connection"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "no address", "http://[::1", ""])
async def test_an_address_that_is_none_is_said_to_be_none(pool: Pool, url: str) -> None:
    error = await failure(pool, Endpoint("local", url, {}))
    assert error.message == "The address of local is not an http or https address."
    assert error.retry is None


async def test_a_server_without_tls_cannot_prove_who_it_is(provider: Provider, pool: Pool) -> None:
    url = provider.base_url.replace("http:", "https:")
    error = await failure(pool, Endpoint("local", url, {}))
    assert "TLS" in error.message


async def test_leaving_the_stream_cuts_the_connection(provider: Provider, pool: Pool) -> None:
    provider.reply(Reply(text=["Hel"], hang=True, hang_after=1))
    async with aclosing(pool.stream(endpoint(provider), BODY)) as reads:
        await anext(reads)
    await provider.left()


@pytest.mark.parametrize("hang_after", [-1, 0, 1])
async def test_cancelling_the_reader_cuts_the_connection(
    provider: Provider, pool: Pool, hang_after: int
) -> None:
    provider.reply(Reply(text=["Hel"], hang=True, hang_after=hang_after))
    task = asyncio.create_task(read(pool, endpoint(provider)))
    await provider.requested()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.left()


async def test_one_connection_serves_one_call_after_another(provider: Provider, pool: Pool) -> None:
    for _ in range(3):
        # The end of a response often comes in a packet of its own.
        provider.reply(Reply(body=[sse(1, b"[DONE]"), b""], delay_s=0.01))
        assert await read(pool, endpoint(provider)) == [b"1"]
    assert len({asked.peer for asked in provider.requests}) == 1


async def test_a_kept_connection_that_is_closed_is_replaced_by_a_new_one(
    provider: Provider, pool: Pool
) -> None:
    provider.reply(Reply(text=["one"]), Reply(cut_after=-1), Reply(text=["two"]))
    await read(pool, endpoint(provider))
    assert any(b"two" in payload for payload in await read(pool, endpoint(provider)))
    first, second, third = (asked.peer for asked in provider.requests)
    assert first == second != third


async def test_a_provider_that_stays_on_the_line_after_its_last_event_holds_nothing_up(
    provider: Provider, pool: Pool
) -> None:
    provider.reply(Reply(body=sse(1, b"[DONE]"), hang=True, hang_after=1))
    assert await read(pool, endpoint(provider)) == [b"1"]
    await provider.left()


@pytest.mark.parametrize(
    ("status", "retry", "words"),
    [
        (400, None, ["did not accept the request (400)"]),
        (401, None, ["refused the key in OPENAI_API_KEY", "Set OPENAI_API_KEY"]),
        (402, None, ["billing"]),
        (403, None, ["refused the key in OPENAI_API_KEY"]),
        (404, None, ["no such model"]),
        (408, "provider_error", ["(408)"]),
        (413, None, ["(413)"]),
        (422, None, ["(422)"]),
        (429, "rate_limit", ["limits how often"]),
        (500, "provider_error", ["(500)"]),
        (503, "provider_error", ["overloaded"]),
        (520, "provider_error", ["failed (520)"]),
        (529, "provider_error", ["overloaded"]),
    ],
)
async def test_each_status_says_what_to_do_and_whether_to_try_again(
    provider: Provider, pool: Pool, status: int, retry: str | None, words: Sequence[str]
) -> None:
    provider.reply(Reply(status=status, error="Why it is so."))
    error = await failure(pool, endpoint(provider))
    assert error.retry == retry
    assert error.message.startswith("openai ")
    assert error.message.endswith("It said: Why it is so.")
    assert all(word in error.message for word in words)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "prompt is too long: 213462 tokens > 200000 maximum"),
        (400, "input length and `max_tokens` exceed context limit: 198000 + 32000 > 200000"),
        (400, "This model's maximum context length is 8192 tokens, however you requested 9000."),
        (400, "Your input exceeds the context window of this model."),
        (400, "The input token count (1196265) exceeds the maximum number of tokens allowed."),
        (400, "This model's maximum prompt length is 131072 but the request contains 537812."),
        (400, "The decoder prompt (length 9000) is longer than the maximum model length of 8192."),
        (400, "the request exceeds the available context size. try increasing the context size"),
        (400, "Input is too long for requested model."),
        (400, "Please reduce the length of the messages or completion."),
        (413, "Prompt too long; exceeded max context length by 4 tokens"),
        (500, "the input length exceeds the context length"),
        (500, "Context size has been exceeded."),
    ],
)
async def test_a_prompt_that_is_too_long_is_told_from_other_mistakes(
    provider: Provider, pool: Pool, status: int, said: str
) -> None:
    provider.reply(Reply(status=status, error=said))
    with pytest.raises(ModelError) as raised:
        await read(pool, endpoint(provider))
    for error in (raised.value, reported(endpoint(provider), {"message": said})):
        assert (error.code, error.retry) == (OVERFLOW, None)
        assert said in error.message


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, "Request too large on tokens per min: reduce the length of the messages."),
        (401, "The maximum context length is for paying customers."),
        (400, "'messages' is too short"),
        (400, "max_tokens is too large"),
        (400, "The context is missing."),
    ],
)
async def test_what_sounds_like_a_long_prompt_and_is_none_is_no_overflow(
    provider: Provider, pool: Pool, status: int, said: str
) -> None:
    provider.reply(Reply(status=status, error=said))
    assert (await failure(pool, endpoint(provider))).code == "provider_error"


async def test_a_server_that_wants_a_key_where_none_is_set_is_understood(
    provider: Provider, pool: Pool
) -> None:
    provider.reply(Reply(status=401))
    error = await failure(pool, Endpoint("local", f"{provider.base_url}/chat/completions", {}))
    assert "it may want a key" in error.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "wrong"}}', "wrong"),
        (b'{"error": "wrong"}', "wrong"),
        (b'[{"error": {"code": 400, "message": "wrong", "status": "INVALID"}}]', "wrong"),
        (b'{"message": "wrong"}', "wrong"),
        (b'{"detail": "wrong"}', "wrong"),
        (b'{"detail": [{"loc": ["body"], "msg": "x", "message": "wrong"}]}', "wrong"),
        (b"wrong\n  again", "wrong again"),
        (b"<html>Bad gateway</html>", ""),
        (b'{"odd": 1}', ""),
        (b"17", ""),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b'{"error": {"message": ["no", {}]}}', "no"),
    ],
)
async def test_the_providers_own_words_are_found_wherever_they_stand(
    provider: Provider, pool: Pool, body: bytes, said: str
) -> None:
    provider.reply(Reply(status=400, body=body))
    error = await failure(pool, endpoint(provider))
    assert error.message.partition(" It said: ")[2] == said


async def test_a_key_that_the_provider_repeats_is_masked(provider: Provider, pool: Pool) -> None:
    odd = "no-known-shape-" + "b" * 9
    url = f"{provider.base_url}/chat/completions"
    for headers in ({"x-api-key": odd}, {"Authorization": f"Bearer {odd}"}):
        where = Endpoint("local", url, headers)
        provider.reply(Reply(status=401, error=f"Wrong key: {odd} or {KEY}."))
        error = await failure(pool, where)
        assert error.message.endswith("Wrong key: [secret] or [secret].")
        assert odd not in repr(where)


async def test_the_providers_words_are_cut_after_they_are_masked(
    provider: Provider, pool: Pool
) -> None:
    provider.reply(Reply(status=400, error="x" * (SAID_LENGTH_MAX - 10) + " " + KEY))
    error = await failure(pool, endpoint(provider))
    assert KEY[:9] not in error.message
    provider.reply(Reply(status=400, error="x" * 10_000))
    error = await failure(pool, endpoint(provider))
    assert len(error.message) < SAID_LENGTH_MAX + 100
    assert error.message.endswith("…")


async def test_an_endless_error_body_is_read_up_to_its_limit(
    provider: Provider, pool: Pool
) -> None:
    body = b"x" * (ERROR_BYTES_MAX + 1)
    provider.reply(Reply(status=500, body=body, hang=True, hang_after=1))
    async with asyncio.timeout(2):
        error = await failure(pool, endpoint(provider, silence_s=20))
    assert error.retry == "provider_error"
    await provider.left()


async def test_an_error_whose_body_never_comes_is_told_by_its_status(
    provider: Provider, pool: Pool
) -> None:
    provider.reply(Reply(status=503, hang=True))
    error = await failure(pool, endpoint(provider, silence_s=0.1))
    assert error.message == "openai is failing or overloaded (503)."


@pytest.mark.parametrize(
    ("headers", "retry_after_s"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": DATE}, 30.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:27:00 GMT", "Date": DATE}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
    ],
)
async def test_when_to_try_again_is_read_from_seconds_milliseconds_and_dates(
    provider: Provider, pool: Pool, headers: dict[str, str], retry_after_s: float | None
) -> None:
    provider.reply(Reply(status=429, headers=headers))
    error = await failure(pool, endpoint(provider))
    assert error.retry_after_s == retry_after_s


async def test_an_empty_account_is_no_rate_limit(provider: Provider, pool: Pool) -> None:
    body = json.dumps({"error": {"message": "No quota.", "code": "insufficient_quota"}}).encode()
    provider.reply(Reply(status=429, body=body, headers={"Retry-After": "1"}))
    error = await failure(pool, endpoint(provider))
    assert "billing" in error.message
    assert error.retry is None
    assert error.retry_after_s is None


async def test_a_redirect_is_not_followed_with_the_key(provider: Provider, pool: Pool) -> None:
    location = {"Location": f"{provider.base_url}/messages"}
    provider.reply(Reply(status=307, headers=location))
    error = await failure(pool, endpoint(provider))
    assert "moved" in error.message
    assert len(provider.requests) == 1


@pytest.mark.parametrize(
    ("kind", "body", "words", "retry"),
    [
        ("application/json", b'{"error": {"message": "Busy.", "code": 503}}', "Busy.", True),
        ("application/json", b'{"error": {"message": "No.", "code": 400}}', "No.", False),
        ("application/json", b'{"choices": []}', "not with an event stream", False),
        ("application/json", b"nonsense", "not with an event stream", False),
        ("application/json; charset=utf-8", b"[]", "not with an event stream", False),
        ("text/html", b"<html>Log in here</html>", "answered with text/html", False),
    ],
)
async def test_a_good_status_without_a_stream_is_an_error(
    provider: Provider, pool: Pool, kind: str, body: bytes, words: str, retry: bool
) -> None:
    provider.reply(Reply(body=body, headers={"Content-Type": kind}))
    error = await failure(pool, endpoint(provider))
    assert words in error.message
    assert error.retry == ("provider_error" if retry else None)


async def test_a_stream_with_a_wrong_label_is_still_read(provider: Provider, pool: Pool) -> None:
    provider.reply(Reply(body=sse(1), headers={"Content-Type": "text/plain"}))
    assert await read(pool, endpoint(provider)) == [b"1"]


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        ({"type": "overloaded_error", "message": "x"}, "provider_error"),
        ({"type": "rate_limit_error", "message": "x"}, "rate_limit"),
        ({"type": "invalid_request_error", "message": "x"}, None),
        ({"code": 429, "message": "x"}, "rate_limit"),
        ({"code": "insufficient_quota", "message": "x"}, None),
        ({"type": "something_new", "message": "x"}, "provider_error"),
        ("x", "provider_error"),
    ],
)
def test_an_error_object_says_itself_whether_to_try_again(error: Any, retry: str | None) -> None:
    found = reported(Endpoint("local", "http://localhost/v1", {}), error)
    assert found.retry == retry
    assert found.message.endswith("It said: x")
