"""PostgreSQL, Redis and S3 on this machine: real, kept, private, and never left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import redis

from infra import embedded
from infra.settings import Settings
from infra.storage import Storage
from stand.real_redis import NEEDS_REDIS
from state.events import Secret

from .conftest import Holder, eventually, is_alive

Start = Callable[..., embedded.Running]
Hold = Callable[[], Holder]


def fill(settings: Settings) -> None:
    with psycopg.connect(settings.database_url.reveal()) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (word text)")
        connection.execute("INSERT INTO kept VALUES ('here')")
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        client.rpush("kept", "here")
    storage = Storage.connect(settings)
    storage.ensure_bucket()
    storage.put_bytes("kept", b"here")


def check(settings: Settings) -> None:
    with psycopg.connect(settings.database_url.reveal()) as connection:
        assert connection.execute("SELECT word FROM kept").fetchone() == ("here",)
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        assert client.lrange("kept", 0, 0) == [b"here"]
    assert Storage.connect(settings).get_bytes("kept") == b"here"


@NEEDS_REDIS
def test_servers_start_keep_their_data_and_end(start: Start, data_dir: Path) -> None:
    seen: list[tuple[str, str]] = []
    servers = start(progress=lambda name, state: seen.append((name, state)))
    assert {name for name, state in seen if state == "ready"} == {"postgresql", "redis", "s3"}
    assert set(servers.seconds) == {"postgresql", "redis", "s3"}
    fill(servers.settings)
    pids = servers.pids
    assert set(pids) == {"supervisor", "postgresql", "redis", "s3"}
    servers.close()
    servers.close()
    assert not any(is_alive(pid) for pid in pids.values())
    assert not (data_dir / "postgresql" / "data-18" / "postmaster.pid").exists()

    again = start()
    check(again.settings)
    assert again.settings.secret_keys == servers.settings.secret_keys
    assert again.settings.s3_endpoint == servers.settings.s3_endpoint  # the port, while it is free


@NEEDS_REDIS
def test_servers_are_the_real_ones_with_every_commit_on_disk(start: Start) -> None:
    settings = start().settings
    with psycopg.connect(settings.database_url.reveal()) as connection:
        shown = {
            name: str(connection.execute(f"SHOW {name}").fetchone()[0])  # type: ignore[index]
            for name in ("server_version_num", "fsync", "synchronous_commit", "server_encoding")
        }
        who = connection.execute("SELECT current_user, current_database()").fetchone()
    assert shown["server_version_num"].startswith("18")
    assert (shown["fsync"], shown["synchronous_commit"]) == ("on", "on")
    assert shown["server_encoding"] == "UTF8"
    assert who == ("stoker", "stoker")
    with redis.Redis.from_url(settings.redis_url.reveal()) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.eval("return 1 + 1", 0) == 2


@NEEDS_REDIS
def test_nobody_comes_in_without_the_password_or_from_outside(start: Start) -> None:
    servers = start()
    settings = servers.settings
    url = settings.database_url.reveal()
    word = url.partition("stoker:")[2].partition("@")[0]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(word, "wrong"))
    port = int(settings.redis_url.reveal().rpartition(":")[2].partition("/")[0])
    with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    ports = json.loads((settings.data_dir / "ports.json").read_text())
    outside = _own_address()
    for number in ports.values():
        with socket.socket() as line:
            line.settimeout(1)
            assert line.connect_ex((outside, number)) != 0


def _own_address() -> str:
    """This machine's address on its network; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        try:
            line.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        address = str(line.getsockname()[0])
    return address


def test_secrets_are_readable_by_their_owner_alone_and_in_no_argument(
    start: Start, data_dir: Path
) -> None:
    servers = start()
    secrets = json.loads((data_dir / "secrets.json").read_text())
    for path in ("secrets.json", "running.json", "redis/redis.conf", "s3/conf/proxy.conf"):
        assert (data_dir / path).stat().st_mode & 0o077 == 0
    assert not (data_dir / "postgresql" / "password").exists()
    words = [value for name, value in secrets.items() if name != "s3_access_key"]
    for pid in servers.pids.values():
        line = Path(f"/proc/{pid}/cmdline").read_text()
        assert not any(word in line for word in words)
    for log in data_dir.glob("*/log"):
        assert not any(word in log.read_text() for word in words)
    assert not any(word in repr(servers.settings) for word in words)


def test_commands_beside_find_the_running_servers(start: Start, data_dir: Path) -> None:
    outside = Settings(data_dir=data_dir)
    assert embedded.running(outside) is None
    servers = start()
    found = embedded.running(outside)
    assert found == servers.settings
    servers.close()
    assert embedded.running(outside) is None
    assert embedded.running(Settings(data_dir=data_dir / "none")) is None


def test_second_stoker_in_the_same_place_says_who_is_there(start: Start) -> None:
    start()
    with pytest.raises(embedded.EmbeddedError, match=rf"another Stoker runs .*pid {os.getpid()}"):
        start(patience_s=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_servers_end_with_their_parent_however_it_ends(
    hold: Hold, start: Start, data_dir: Path, number: signal.Signals
) -> None:
    holder = hold()
    everything = holder.everything()
    assert set(holder.pids.values()) <= everything
    holder.process.send_signal(number)
    assert eventually(lambda: not any(is_alive(pid) for pid in everything))
    # ended in good order, not by recovery
    log = (data_dir / "postgresql" / "log").read_text()
    assert log.rstrip().endswith("database system is shut down")
    start().close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a parent-death signal")
def test_all_servers_end_when_their_supervisor_is_killed(hold: Hold, start: Start) -> None:
    holder = hold()
    servers = holder.everything() - {holder.pids["supervisor"]}
    os.kill(holder.pids["supervisor"], signal.SIGKILL)
    assert eventually(lambda: not any(is_alive(pid) for pid in servers))
    holder.close()
    start().close()


@pytest.mark.parametrize("name", ["postgresql", pytest.param("redis", marks=NEEDS_REDIS), "s3"])
def test_killed_server_comes_back_with_its_data(start: Start, name: str) -> None:
    servers = start()
    fill(servers.settings)
    pid = servers.pids[name]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: servers.pids.get(name, pid) != pid)

    def works() -> bool:
        try:
            check(servers.settings)
        except Exception:  # noqa: BLE001 -- each server has its own way to be away
            return False
        return True

    assert eventually(works)


def test_servers_that_settings_name_are_not_started(data_dir: Path) -> None:
    settings = Settings(
        data_dir=data_dir / "unused",
        database_url=Secret("postgresql://db"),
        redis_url=Secret("redis://cache"),
        s3_endpoint="https://s3.example",
    )
    with embedded.start(settings) as servers:
        assert servers.settings == settings
        assert servers.pids == {}
    assert not settings.data_dir.exists()
    only_redis = dataclasses.replace(settings, redis_url=Secret(""))
    with embedded.start(only_redis) as servers:
        assert set(servers.pids) == {"supervisor", "redis"}
        assert servers.settings.secret_keys == ()


def test_stand_in_carries_messages_where_there_is_no_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("infra.embedded.redis.find", lambda: None)
    settings = Settings(
        data_dir=tmp_path,
        database_url=Secret("postgresql://db"),
        s3_endpoint="https://s3.example",
    )
    with embedded.start(settings) as servers:
        url = servers.settings.redis_url.reveal()
        with redis.Redis.from_url(url) as sender, redis.Redis.from_url(url) as receiver:
            sender.lpush("wake", "job")
            assert receiver.brpop(["wake"], timeout=5) == (b"wake", b"job")
            assert sender.eval("return redis.call('incr', 'n')", 0) == 1
        pid = servers.pids["redis"]
    assert not is_alive(pid)
    assert "stand-in" in caplog.text


def test_full_disk_and_bad_folder_are_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match="nearly full"):
        embedded.start(Settings(data_dir=tmp_path / "a"), needed_bytes=10**18)
    (tmp_path / "file").touch()
    with pytest.raises(embedded.EmbeddedError, match="cannot be used"):
        embedded.start(Settings(data_dir=tmp_path / "file"))


def test_file_system_without_extended_attributes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    settings = Settings(
        data_dir=tmp_path, database_url=Secret("postgresql://db"), redis_url=Secret("redis://x")
    )
    with pytest.raises(embedded.EmbeddedError, match="no extended attributes") as caught:
        embedded.start(settings)
    assert "STOKER_DATA" in caught.value.hint


def test_server_that_cannot_start_is_named_with_its_log_and_leaves_nothing(
    start: Start, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start().close()
    config = data_dir / "postgresql" / "data-18" / "postgresql.conf"
    before = config.read_text()
    config.write_text(before + "\nno_such_setting = 1\n")
    try:
        with pytest.raises(embedded.EmbeddedError, match="postgresql ended") as caught:
            start()
        assert str(data_dir / "postgresql" / "log") in caught.value.hint
    finally:
        config.write_text(before)
    start()


def test_interrupted_first_start_is_repaired(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, redis_url=Secret("redis://x"), s3_endpoint="https://s3.example"
    )
    half = tmp_path / "postgresql" / "new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18")
    with embedded.start(settings) as servers:
        assert servers.settings.database_url.reveal()
    shutil.rmtree(tmp_path)
