import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from ownware_gateway.masking import (
    EDGE_CHARS_MAX,
    MASK,
    NEEDLES,
    PIECE_CHARS,
    Masker,
    without_begun,
    without_ended,
)

A, Z = "aB3" * 12, "zY9" * 12
HEADER_JWT = "ey" + "J" + A + ".ey" + "J" + Z + "." + A
BEGIN, END = "-----BEGIN {}PRIVATE KEY{}-----", "-----END {}PRIVATE KEY{}-----"

SECRETS = [
    "sk-" + "a" * 24,
    "sk-proj-" + A + "_" + Z,
    "sk-ant-api03-" + A,
    "pk-" + A,
    "rk-" + A,
    "sk_" + "live_" + A,
    "rk_" + "test_" + A,
    "ghp_" + A,
    "gho_" + A,
    "ghs_" + A,
    "github" + "_pat_" + A + "_" + Z,
    "glpat-" + A,
    "gsk_" + A,
    "hf_" + A,
    "xai-" + A,
    "xoxb-" + "1234567890-" + A,
    "xapp-" + "1-" + A,
    "123456789:" + "AA" + "h" * 33,
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "ASIA" + "ABCDEFGHIJKLMNOP",
    "AIza" + A,
    HEADER_JWT,
]
KEY_SHAPED, KNOWN_SECRET = SECRETS[0], "correct horse"


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:8])
def test_a_well_known_shape_is_masked_wherever_it_stands(secret: str) -> None:
    masker = Masker()
    for before, after in [("", ""), ("key=", "\n"), ('{"k":"', '"}'), ("(", ")"), ("is ", ".")]:
        masked = masker.text(before + secret + after)
        assert masked.startswith(before + MASK)
        assert secret[8:] not in masked
        assert masked.removeprefix(before + MASK) in (after, "")


@pytest.mark.parametrize("token", ["a" * 24, "abc123def456", A, "abcdefghijkl=0"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_bearer_token_is_masked_and_its_scheme_is_not(scheme: str, token: str) -> None:
    said = f"curl -H 'Authorization: {scheme} {token}' http://x"
    assert Masker().text(said) == f"curl -H 'Authorization: {scheme} {MASK}' http://x"


def test_basic_credentials_are_masked() -> None:
    said = "Authorization: Basic " + "dXNlcjpwYXNz"
    assert Masker().text(said) == f"Authorization: Basic {MASK}"


@pytest.mark.parametrize("login", ["me:hunter2", ":hunter2", "me:a%40b"])
def test_a_login_in_an_address_is_masked(login: str) -> None:
    assert Masker().text(f"postgres://{login}@db:5432/x") == f"postgres://{MASK}@db:5432/x"


@pytest.mark.parametrize(
    ("kind", "block"), [("", ""), ("RSA ", ""), ("OPENSSH ", ""), ("PGP ", " BLOCK")]
)
def test_a_private_key_is_masked_whole_even_when_it_is_cut_off(kind: str, block: str) -> None:
    begin, end = BEGIN.format(kind, block), END.format(kind, block)
    assert Masker().text(f"a\n{begin}\nMIIB\nAAAA\n{end}\nb") == f"a\n{MASK}\nb"
    assert Masker().text(f"a\n{begin}\nMIIB\nAA") == f"a\n{MASK}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The quick brown fox jumps over the lazy dog.",
        "a task-oriented-approach-to-things and risk-management-in-the-large",
        "Bearer authentication is what the API uses; a bearer certificate is not.",
        "Basic understanding of authorization: none",
        "commit 4fda38981c2b6d3e7a9f0b1c2d3e4f5a6b7c8d9e",
        "550e8400-e29b-41d4-a716-446655440000",
        "https://example.com:443/a@b?x=1 and git@github.com:me/repo.git",
        "http://localhost:3011, mail me@example.com",
        "12:30:45 and 10.0.0.1:8080",
        "sk-short ghp_short AKIA hf_transformers eyJ.eyJ.x",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "password, secret and token are words",
        "def get_token(api_key): return api_key",
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ",
        "привет 🔑 日本語",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert Masker(["correct horse battery"]).text(text) == text


def test_what_the_gateway_holds_is_masked_wherever_it_stands() -> None:
    masker = Masker(["correct horse", "correct horse battery", "a.c(e)g*i"])
    assert masker.text("xcorrect horse battery!") == f"x{MASK}!"
    assert masker.text("correct horse, correct horse") == f"{MASK}, {MASK}"
    assert masker.text("a.c(e)g*i abcdefghi") == f"{MASK} abcdefghi"


def test_a_value_too_short_to_be_a_secret_masks_no_words() -> None:
    assert Masker(["", "test", "1234567"]).text("a test of 1234567") == "a test of 1234567"
    assert Masker(["12345678"]).text("a test of 12345678") == f"a test of {MASK}"


def test_secrets_are_found_at_any_depth_and_the_original_is_not_touched() -> None:
    value = {"a": [{"b": ["x", SECRETS[0], None]}], "n": 1, "f": 1.5, "t": True}
    before = json.dumps(value)
    masked = {"a": [{"b": ["x", MASK, None]}], "n": 1, "f": 1.5, "t": True}
    assert Masker().value(value) == masked
    assert json.dumps(value) == before


def test_a_name_may_be_a_secret_too() -> None:
    assert Masker().value({SECRETS[0]: 1}) == {MASK: 1}


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "Password",
        "PASSWORD",
        "db_password",
        "dbPassword",
        "passwd",
        "passphrase",
        "secret",
        "clientSecret",
        "client-secret",
        "token",
        "tokens",
        "access_token",
        "accessToken",
        "api_key",
        "apiKey",
        "apikey",
        "API-KEY",
        "X-API-Key",
        "OPENAI_API_KEY",
        "openaiApiKeys",
        "private_key",
        "privateKey",
        "secretKey",
        "aws_secret_access_key",
        "credentials",
        "Authorization",
        "proxy-authorization",
    ],
)
def test_a_field_that_is_named_like_a_secret_is_masked(name: str) -> None:
    assert Masker().value({name: "plain", "x": {name: "plain"}}) == {name: MASK, "x": {name: MASK}}


def test_all_text_below_a_secret_name_is_masked() -> None:
    value = {"credentials": {"user": "me", "keys": ["a", "b"]}, "tokens": ["x", "", 3]}
    assert Masker().value(value) == {
        "credentials": {"user": MASK, "keys": [MASK, MASK]},
        "tokens": [MASK, "", 3],
    }


def test_numbers_and_empty_values_say_nothing_secret() -> None:
    value = {"max_tokens": 512, "token": None, "password": "", "secret": False}
    assert Masker().value(value) == value


@pytest.mark.parametrize(
    "name", ["tokenizer", "secretary", "key", "path", "keyboard", "passwords_file", "compass"]
)
def test_a_field_that_is_not_named_like_a_secret_is_left_alone(name: str) -> None:
    assert Masker().value({name: "plain"}) == {name: "plain"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(SECRETS),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("apiKey"), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(JSON)
def test_masking_twice_changes_nothing_more_and_no_secret_is_left(value: Any) -> None:
    masker = Masker(["correct horse"])
    masked = masker.value(value)
    assert masker.value(masked) == masked
    assert not any(secret in json.dumps(masked) for secret in SECRETS)


def test_a_value_that_is_forgotten_is_not_replaced_any_more() -> None:
    masker = Masker(["always-hidden"])
    new = masker.hide(["always-hidden", "hidden-for-now", "short"])
    assert new == {"hidden-for-now"}
    assert masker.text("always-hidden hidden-for-now") == f"{MASK} {MASK}"
    masker.forget(new)
    assert masker.text("always-hidden hidden-for-now") == f"{MASK} hidden-for-now"
    masker.forget(["always-hidden"])
    assert masker.text("always-hidden") == "always-hidden"


# -- long texts


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    *(KEY_SHAPED, "Bearer " + "a1" * 9, "Authorization: Basic " + "b" * 14),
                    *("https://me:word@host/", KNOWN_SECRET, "\n", " ", "plain words"),
                    BEGIN.format("", "") + "\nabc\n" + END.format("", ""),
                ]
            ),
            st.text(alphabet="ab1:/@-._ \n", max_size=30),
        ),
        max_size=30,
    )
)
def test_a_long_text_masked_in_pieces_is_what_it_is_masked_at_once(parts: list[str]) -> None:
    masker = Masker([KNOWN_SECRET])
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ownware_gateway.masking.PIECE_CHARS", 10)
        patch.setattr("ownware_gateway.masking.REACH_CHARS", 2_000)
        pieces = list(masker.pieces(text))
    joined, whole = "".join(pieces), masker.text(text)
    # A place of a cut may make more look like a secret, never less.
    left = [secret for secret in (KEY_SHAPED, KNOWN_SECRET, "a1" * 9, "word") if secret in joined]
    assert [secret for secret in left if secret not in whole] == []
    assert joined.count(MASK) >= whole.count(MASK)


def test_a_long_ordinary_text_comes_in_many_pieces() -> None:
    text = "one word after the other " * 20_000
    pieces = list(Masker().pieces(text))
    assert len(pieces) == -(-len(text) // PIECE_CHARS)
    assert "".join(pieces) == text


def test_every_shape_is_looked_for() -> None:
    # A shape without a needle would never be found.
    for secret in SECRETS:
        assert any(needle in f"Bearer {secret}" for needle in NEEDLES)
        assert Masker().text(f" {secret} ") != f" {secret} "


def test_at_an_edge_no_part_of_a_secret_is_left() -> None:
    assert without_begun(f"one two {KEY_SHAPED[:9]}") == "one two "
    assert without_begun("one two ") == "one two "
    assert without_begun("") == ""
    assert without_ended(f"{KEY_SHAPED[9:]} one two") == " one two"
    assert without_ended("\none") == "\none"
    begin, end = BEGIN.format("", ""), "abc=\n" + END.format("", "")
    assert without_ended(f"{end} rest") == f"{MASK} rest"
    assert without_ended(f"a {begin}\n{end}") == f" {begin}\n{end}"
    long = "x" * 10 * EDGE_CHARS_MAX
    assert len(without_begun(long)) == len(without_ended(long)) == 9 * EDGE_CHARS_MAX
