import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ownware_gateway.datadir import DataDir, read_token, running
from ownware_gateway.errors import BootError

HOLD = """
import sys
from pathlib import Path
from ownware_gateway.datadir import DataDir
opened = DataDir.open(Path(sys.argv[1]))
opened.announce("http://127.0.0.1:3011")
print("locked", flush=True)
sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def another_gateway(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_a_new_folder_is_created_with_its_parents_and_is_private(tmp_path: Path) -> None:
    with DataDir.open(tmp_path / "a" / "b") as opened:
        assert opened.path == tmp_path / "a" / "b"
        assert mode(opened.path) == 0o700
        assert mode(opened.path / "gateway.lock") == 0o600


def test_an_open_folder_and_open_files_in_it_are_tightened(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    path.chmod(0o777)
    (path / "gateway.lock").touch()
    (path / "gateway.lock").chmod(0o666)
    with DataDir.open(path):
        assert mode(path) == 0o700
        assert mode(path / "gateway.lock") == 0o600


@pytest.mark.parametrize("mask", [0o000, 0o177, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "data"
    with umask(mask), DataDir.open(path) as opened:
        opened.token()
        assert mode(path) == 0o700
        assert mode(path / "gateway.lock") == 0o600
        assert mode(path / "gateway-token") == 0o600


def test_a_path_that_is_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(
        BootError, match=rf"The data directory {file} cannot be used: it is not a folder\. Choose"
    ):
        DataDir.open(file)


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BootError, match="cannot be used: Not a directory"):
        DataDir.open(tmp_path / "file" / "data")


def test_a_path_with_an_impossible_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="cannot be used: File name too long"):
        DataDir.open(tmp_path / ("a" * 300))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_made_private_is_refused() -> None:
    with pytest.raises(BootError, match="The data directory /proc/self/task cannot be used"):
        DataDir.open(Path("/proc/self/task"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_below_a_read_only_one_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BootError, match="Permission denied"):
        DataDir.open(tmp_path / "data")


def test_a_shared_folder_is_refused_before_its_mode_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    with pytest.raises(BootError, match="it is shared with other programs"):
        DataDir.open(path)
    assert mode(path) == 0o1777


def test_a_second_gateway_names_the_first(tmp_path: Path) -> None:
    with DataDir.open(tmp_path), pytest.raises(BootError) as refused:
        DataDir.open(tmp_path)
    assert str(refused.value) == (
        f"Another gateway (process {os.getpid()}) is using {tmp_path}; "
        "stop it or choose another --data-dir."
    )


def test_a_second_gateway_in_another_process_is_seen_and_refused(tmp_path: Path) -> None:
    with another_gateway(tmp_path) as process:
        assert running(tmp_path) == (process.pid, "http://127.0.0.1:3011")
        with pytest.raises(BootError, match=rf"\(process {process.pid}\) is using"):
            DataDir.open(tmp_path)


def test_a_killed_gateway_leaves_no_lock(tmp_path: Path) -> None:
    with another_gateway(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        # What the lock file says is stale now; only the lock itself counts.
        assert (tmp_path / "gateway.lock").read_text().startswith(f"{process.pid}\n")
        assert running(tmp_path) is None
        with DataDir.open(tmp_path):
            assert running(tmp_path) == (os.getpid(), "")


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with DataDir.open(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert running(tmp_path) is None
    finally:
        child.kill()
        child.wait()


def test_the_address_is_found_once_it_is_announced_and_until_it_is_closed(tmp_path: Path) -> None:
    opened = DataDir.open(tmp_path)
    assert running(tmp_path) == (os.getpid(), "")
    opened.announce("http://[::1]:40000/with/a/long/tail")
    assert running(tmp_path) == (os.getpid(), "http://[::1]:40000/with/a/long/tail")
    opened.announce("http://[::1]:1")
    assert running(tmp_path) == (os.getpid(), "http://[::1]:1")
    opened.close()
    assert running(tmp_path) is None
    opened.close()


def test_looking_leaves_nothing_behind_and_takes_nothing_away(tmp_path: Path) -> None:
    assert running(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()
    assert running(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with DataDir.open(tmp_path):
        pass
    assert running(tmp_path) is None
    with DataDir.open(tmp_path):
        pass


def test_two_clients_that_look_at_once_do_not_take_each_other_for_a_gateway(
    tmp_path: Path,
) -> None:
    with DataDir.open(tmp_path):
        pass
    with (tmp_path / "gateway.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert running(tmp_path) is None


def test_a_client_that_looks_does_not_stop_a_gateway_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = os.open(tmp_path / "gateway.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("ownware_gateway.datadir.time.sleep", lambda seconds: os.close(looking))
    with DataDir.open(tmp_path):
        assert running(tmp_path) == (os.getpid(), "")


def test_the_lock_file_is_never_removed(tmp_path: Path) -> None:
    with DataDir.open(tmp_path):
        inode = (tmp_path / "gateway.lock").stat().st_ino
    assert (tmp_path / "gateway.lock").stat().st_ino == inode


def test_the_token_is_made_once(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as opened:
        token, new = opened.token()
        assert new
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
        assert opened.token() == (token, False)
    with DataDir.open(tmp_path) as opened:
        assert opened.token() == (token, False)
    assert read_token(tmp_path) == token
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway-token", "gateway.lock"]


def test_two_folders_have_two_tokens(tmp_path: Path) -> None:
    with DataDir.open(tmp_path / "a") as a, DataDir.open(tmp_path / "b") as b:
        assert a.token()[0] != b.token()[0]


def test_a_token_that_others_could_read_is_tightened(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as opened:
        token, _ = opened.token()
        (tmp_path / "gateway-token").chmod(0o644)
        assert opened.token() == (token, False)
        assert mode(tmp_path / "gateway-token") == 0o600


@pytest.mark.parametrize("text", ["", "\n", "short", "x" * 31, "two words " * 8, "\0" * 64])
def test_a_file_that_holds_no_token_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gateway-token"
    file.write_text(text)
    with DataDir.open(tmp_path) as opened, pytest.raises(BootError) as refused:
        opened.token()
    assert str(refused.value) == (
        f"The token file {file} holds no token of at least 32 URL-safe characters; "
        "delete it to have a new one made."
    )
    assert file.read_text() == text
    with pytest.raises(BootError, match="holds no token"):
        read_token(tmp_path)


def test_a_token_that_a_person_chose_is_used(tmp_path: Path) -> None:
    (tmp_path / "gateway-token").write_text(f"  {'c0ffee' * 8}\r\n")
    with DataDir.open(tmp_path) as opened:
        assert opened.token() == ("c0ffee" * 8, False)


def test_a_token_file_that_cannot_be_read_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gateway-token").mkdir()
    with DataDir.open(tmp_path) as opened, pytest.raises(BootError, match="cannot be read: Is a"):
        opened.token()


def test_a_client_finds_no_token_where_there_is_none(tmp_path: Path) -> None:
    assert read_token(tmp_path) is None
    assert read_token(tmp_path / "absent") is None


def test_everything_is_kept_in_the_folder(tmp_path: Path) -> None:
    with DataDir.open(tmp_path) as opened:
        assert opened.database == tmp_path / "gateway.db"
        assert opened.workspace == tmp_path / "workspace"
