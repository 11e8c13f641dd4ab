from dataclasses import fields
from pathlib import Path

import platformdirs
import pytest

from ownware_gateway.errors import BootError
from ownware_gateway.settings import Settings, child_environment, load, variable

KEY = "sk-" + "a" * 24


def test_without_flags_and_variables_everything_is_the_default() -> None:
    settings = load({})
    assert settings == Settings()
    assert settings.host == "127.0.0.1"
    assert settings.port == 3011


def test_a_home_that_nobody_knows_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(platformdirs, "user_data_dir", unknown)
    with pytest.raises(BootError, match="OWNWARE_DATA_DIR"):
        _ = Settings().data_path
    assert Settings(data_dir="/data").data_path == Path("/data")


def test_a_flag_beats_a_variable_which_beats_the_default() -> None:
    environ = {"OWNWARE_PORT": "4000", "OWNWARE_HOST": "::1"}
    settings = load(environ, {"port": 5000, "host": None})
    assert (settings.port, settings.host) == (5000, "::1")
    assert settings.log_level == "info"


def test_a_flag_that_is_off_beats_a_variable_that_is_on() -> None:
    assert not load({"OWNWARE_REQUIRE_AUTH": "1"}, {"require_auth": False}).require_auth


def test_the_real_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWNWARE_PORT", "4001")
    assert load().port == 4001


def test_every_setting_has_a_variable_of_its_own_and_a_sentence() -> None:
    names = [variable(item.name) for item in fields(Settings)]
    assert len(set(names)) == len(names)
    assert variable("data_dir") == "OWNWARE_DATA_DIR"
    assert variable("openai_api_key") == "OPENAI_API_KEY"
    for item in fields(Settings):
        assert item.metadata["doc"].endswith("."), item.name


@pytest.mark.parametrize("text", ["1", "true", "Yes", "ON", " 1 "])
def test_a_switch_is_turned_on(text: str) -> None:
    assert load({"OWNWARE_BEHIND_PROXY": text}).behind_proxy


@pytest.mark.parametrize("text", ["0", "false", "No", "off", ""])
def test_a_switch_is_turned_off(text: str) -> None:
    assert not load({"OWNWARE_BEHIND_PROXY": text}).behind_proxy


def test_a_list_is_separated_by_commas() -> None:
    settings = load({"OWNWARE_SERVED_NAME": " a.example, ,b.example,"})
    assert settings.served_name == ("a.example", "b.example")


def test_a_flag_that_was_given_twice_is_as_frozen_as_the_rest() -> None:
    settings = load({}, {"cors_origin": ["https://a.example", "https://b.example"]})
    assert settings.cors_origin == ("https://a.example", "https://b.example")
    assert hash(settings)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"OWNWARE_PORT": "many"}, "OWNWARE_PORT is 'many'; it must be a number."),
        ({"OWNWARE_PORT": "1.5"}, "OWNWARE_PORT is '1.5'; it must be a number."),
        ({"OWNWARE_PORT": "65536"}, "The port is 65536; it must be from 0 to 65535."),
        ({"OWNWARE_PORT": "-1"}, "The port is -1; it must be from 0 to 65535."),
        ({"OWNWARE_REQUIRE_AUTH": "maybe"}, "OWNWARE_REQUIRE_AUTH is 'maybe'; it must be 1 or 0."),
        (
            {"OWNWARE_LOG_LEVEL": "loud"},
            "The log level is 'loud'; it must be one of: debug, info, warning, error.",
        ),
        ({"OWNWARE_DISCONNECT": "ask"}, "OWNWARE_DISCONNECT must be one of: cancel, keep."),
        ({"OWNWARE_RATE_LIMIT_RUN": "0"}, "OWNWARE_RATE_LIMIT_RUN is 0; it must be above 0."),
        (
            {"OWNWARE_RATE_LIMIT_GENERAL": "-5"},
            "OWNWARE_RATE_LIMIT_GENERAL is -5; it must be above 0.",
        ),
        ({"OWNWARE_RUNS_ACTIVE_MAX": "0"}, "OWNWARE_RUNS_ACTIVE_MAX is 0; it must be above 0."),
        (
            {"OWNWARE_MODEL_SILENCE_S": "soon"},
            "OWNWARE_MODEL_SILENCE_S is 'soon'; it must be a number.",
        ),
        (
            {"OWNWARE_MODEL_SILENCE_S": "nan"},
            "OWNWARE_MODEL_SILENCE_S is nan; it must be above 0.",
        ),
        (
            {"OWNWARE_MODEL_SILENCE_S": "inf"},
            "OWNWARE_MODEL_SILENCE_S is inf; it must be above 0.",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(BootError) as refused:
        load(environ)
    assert str(refused.value).startswith(sentence.removesuffix("."))


def test_a_flag_is_checked_like_a_variable() -> None:
    with pytest.raises(BootError, match="The port is 70000"):
        load({}, {"port": 70_000})


def test_secrets_are_known_as_such_and_are_not_printed() -> None:
    settings = load({"OPENAI_API_KEY": KEY, "OWNWARE_LOCAL_API_KEY": "another-key"})
    assert settings.secrets == {KEY, "another-key"}
    assert KEY not in repr(settings)
    assert "another-key" not in repr(settings)
    assert load({}).secrets == frozenset()


def test_every_setting_that_is_named_like_a_key_is_a_secret() -> None:
    for item in fields(Settings):
        assert item.repr is not item.name.endswith("api_key"), item.name


def test_the_data_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Settings(data_dir="data").data_path == tmp_path / "data"
    assert Settings(data_dir="~/data").data_path == tmp_path / "home" / "data"
    assert Settings(data_dir="/x").data_path == Path("/x")
    assert Settings().data_path == Path(platformdirs.user_data_dir("ownware"))


def test_a_data_directory_in_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(BootError, match="The data directory ~nobody-at-all/x begins with"):
        _ = Settings(data_dir="~nobody-at-all/x").data_path


def test_a_child_process_gets_no_secret_and_nothing_that_it_does_not_need() -> None:
    secrets = {
        variable(item.name): f"secret-{item.name}"
        for item in fields(Settings)
        if item.name.endswith("api_key")
    }
    assert len(secrets) >= 5
    others = {"AWS_SECRET_ACCESS_KEY": "x", "SSH_AUTH_SOCK": "/s", "PYTHONPATH": "/p"}
    environ = secrets | others | {"PATH": "/bin", "HOME": "/home/me", "LANG": "C.UTF-8"}
    child = child_environment(load(environ), environ)
    assert child == {"PATH": "/bin", "HOME": "/home/me", "LANG": "C.UTF-8"}


def test_a_child_process_gets_what_the_operator_listed() -> None:
    environ = {"OWNWARE_TOOL_ENV": "JAVA_HOME,NOT_SET", "JAVA_HOME": "/java", "OTHER": "x"}
    assert child_environment(load(environ), environ) == {"JAVA_HOME": "/java"}


def test_a_child_process_gets_it_from_the_real_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/real")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    child = child_environment(load())
    assert child["PATH"] == "/real"
    assert KEY not in child.values()
