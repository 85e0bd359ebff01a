"""The doctor over real servers, with one fault after another planted."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
import structlog
from werkzeug.serving import make_server

from infra import embedded
from infra.agent_bundle import Bundle
from infra.crypto import SecretBox
from infra.sandbox.server import running_sandbox
from infra.settings import Settings
from infra.wiring import Services, utc_now
from orchestrator.app import create_app
from orchestrator.checks import ready_checks
from orchestrator.cli.app import run
from orchestrator.cli.diagnosis import diagnose
from orchestrator.cli.servers import prepare
from orchestrator.deps import Deps
from stand.real_redis import NEEDS_REDIS
from state.alarms import Severity
from state.endpoints import Endpoint
from state.events import Secret

ACCOUNT = "account-key-hunter2"


class Well:
    """An installation with nothing wrong; `but` is one with something else in its settings."""

    def __init__(self, have: Services) -> None:
        self.have, self.settings = have, have.settings

    def but(self, **changes: object) -> Settings:
        return replace(self.settings, **changes)

    def beat(self, *names: str, ago_s: float = 0.0) -> None:
        now = utc_now()
        with self.have.store.transaction() as tx:
            for name in ("worker", "reconcile", "sweep"):
                tx.beat(name, now - timedelta(seconds=ago_s if name in names else 0.0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def well(tmp_path_factory, make_database):
    root = tmp_path_factory.mktemp("dr")
    # its own: a machine that another test left in a shared one would be a fault
    named = Settings(data_dir=root, database_url=Secret(make_database()))
    with embedded.start(named) as servers, running_sandbox(account_key=ACCOUNT) as sandbox:
        port = free_port()
        settings = replace(
            servers.settings,
            data_dir=root / "elsewhere",  # else it is taken for a `stoker up` here
            secret_keys=(SecretBox.new_key(),),
            public_url=f"http://127.0.0.1:{port}",
            vast_url=sandbox.url,
            vast_api_key=Secret(ACCOUNT),
            vast_pace=0.0,
        )
        have = Services(settings)
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # not to stdout
        prepare(settings)
        app = create_app(
            Deps(
                store=have.store,
                storage=have.storage,
                clock=utc_now,
                wake=lambda task, subject: None,
                bundle=have.bundle,
                resolve_base=have.resolve_base,
                settings=settings,
                ready_checks=ready_checks(have),
            )
        )
        with have.store.transaction() as tx:
            endpoint = Endpoint(
                id="we_1", owner="acme", created_at=utc_now(), url="https://hooks.test/s3cret"
            )
            tx.add_endpoint(endpoint, secrets=[Secret("whsec_" + "A" * 32)])
        web = make_server("127.0.0.1", port, app, threaded=True)
        thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield Well(have)
        web.shutdown()
        thread.join()
        web.server_close()
        have.close()
        structlog.reset_defaults()


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path):
    """Run `stoker doctor` with `settings`; its exit code, its lines by part, and all it said."""

    def ask(settings, *words):
        monkeypatch.chdir(tmp_path)
        for name, value in settings.to_env().items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(["doctor", *words])
        said = capsys.readouterr()
        for setting in (settings.s3_secret_key, settings.vast_api_key, *settings.secret_keys):
            assert setting.reveal() not in said.out + said.err
        assert "hunter2" not in said.out + said.err
        assert "s3cret" not in said.out + said.err
        return int(left.value.code or 0), said.out

    return ask


def test_of_what_is_well_each_part_is_a_line(doctor, well):
    well.beat()
    code, out = doctor(well.settings)
    assert (code, [line for line in out.splitlines() if not line.startswith("✔")]) == (0, [])
    code, out = doctor(well.settings, "--json")
    told = json.loads(out)
    assert told["ok"] is True
    assert {tuple(row) for row in told["parts"]} == {
        ("part", "ok", "severity", "fault", "mend", "seen")
    }


def other_version(settings):
    """Of an installation whose schema is older than what this version needs."""
    with psycopg.connect(settings.database_url.reveal(), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS old")
        connection.execute("CREATE TABLE IF NOT EXISTS old.alembic_version (version_num text)")
        connection.execute("DELETE FROM old.alembic_version")
        connection.execute("INSERT INTO old.alembic_version VALUES ('0001')")
    return with_path(settings, "old,public")


def clock_an_hour_behind(settings):
    """Of an installation whose database says that it is an hour later than it is here."""
    with psycopg.connect(settings.database_url.reveal(), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS later")
        connection.execute(
            "CREATE OR REPLACE FUNCTION later.now() RETURNS timestamptz LANGUAGE sql AS "
            "$$ SELECT pg_catalog.clock_timestamp() + interval '1 hour' $$"
        )
    return with_path(settings, "later,pg_catalog,public")


def with_path(settings, path):
    url = settings.database_url.reveal()
    option = f"options=-csearch_path%3D{path.replace(',', '%2C')}"
    return replace(settings, database_url=Secret(f"{url}{'&' if '?' in url else '?'}{option}"))


#: What is wrong, the part that says so, a word of the fault, and a word of the mend.
FAULTS = {
    "Redis is down": (
        lambda well: well.but(redis_url=Secret("redis://:hunter2@127.0.0.1:9/0")),
        "redis", "Redis does not answer", "REDIS_URL",
    ),
    "Redis wants another password": (
        lambda well: well.but(
            redis_url=Secret(well.settings.redis_url.reveal().replace("@", "hunter2@"))
        ),
        "redis", "refuses the password", "REDIS_URL",
    ),
    "the Vast key is wrong": (
        lambda well: well.but(vast_api_key=Secret("hunter2")),
        "vast", "401", "correct VAST_API_KEY",
    ),
    "the bucket is missing": (
        lambda well: well.but(s3_bucket="nobody-made-it"),
        "s3", "NoSuchBucket", "create the bucket nobody-made-it",
    ),
    "the S3 secret is wrong": (
        lambda well: well.but(s3_secret_key=Secret("hunter2")),
        "s3", "HTTP 403", "AWS_SECRET_ACCESS_KEY",
    ),
    "the database is down": (
        lambda well: well.but(database_url=Secret("postgresql://u:hunter2@127.0.0.1:9/x")),
        "database", "cannot be asked", "start PostgreSQL",
    ),
    "the schema is not upgraded": (
        lambda well: other_version(well.settings), "schema", "at 0001", "stoker db upgrade",
    ),
    "no worker runs": (
        lambda well: well.beat("worker", "reconcile", "sweep", ago_s=600) or well.settings,
        "worker", "10 min ago", "start `stoker worker`",
    ),
    "no beat runs": (
        lambda well: well.beat("reconcile", "sweep", ago_s=600) or well.settings,
        "beat", "10 min ago", "start `stoker beat`",
    ),
    "nobody answers at the public URL": (
        lambda well: well.but(public_url="http://127.0.0.1:9"),
        "public", "the connection was refused", "STOKER_PUBLIC_URL",
    ),
    "somebody else answers at the public URL": (
        lambda well: well.but(public_url=well.settings.vast_url),
        "public", "not as Stoker does", "STOKER_PUBLIC_URL",
    ),
    "Vast does not answer": (
        lambda well: well.but(vast_url="http://127.0.0.1:9"),
        "vast", "no answer", "VAST_URL",
    ),
    "the clock is an hour behind": (
        lambda well: clock_an_hour_behind(well.settings),
        "clock", "60 min behind the database's", "NTP",
    ),
    "a key for stored secrets is lost": (
        lambda well: well.but(secret_keys=(SecretBox.new_key(),)),
        "secrets", "1 of 1 stored secrets open with none", "STOKER_SECRET_KEYS",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=NEEDS_REDIS if "password" in name else ()) for name in FAULTS],
)
def test_a_fault_is_one_line_with_its_mend(doctor, well, fault):
    well.beat()
    plant, part, words, mend = FAULTS[fault]
    code, out = doctor(plant(well))
    red = {line.split()[1]: line for line in out.splitlines() if line.startswith("✘")}
    if fault == "a key for stored secrets is lost":  # and what it signs is not ours either
        assert "another installation" in red.pop("public")
    assert (code, list(red)) == (3, [part]), out
    said, _, then = red[part].partition("; mend: ")
    assert words in said
    assert mend in then


def test_what_hangs_is_said_and_the_rest_is_told(well):
    """A server that takes the connection and says nothing."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        well.beat()
        with closing(Services(well.but(redis_url=Secret(f"redis://{address}/0")))) as have:
            found = {item.part: item for item in diagnose(have, deadline_s=1.0)}
    assert "did not answer within 1 s" in found["redis"].fault
    assert not found["database"].fault


def test_what_needs_an_operator_is_told_but_a_warning_alone_is_no_fault(doctor, well):
    well.beat()
    code, out = doctor(well.but(kill_switch=True))
    (line,) = [line for line in out.splitlines() if not line.startswith("✔")]
    assert code == 0
    assert line.startswith("! kill_switch.on")
    assert "resume-renting" in line


def test_another_agent_at_the_web_process_is_seen(well):
    """A web process of an older version, still running beside new workers."""
    well.beat()
    older = b"an older agent"
    with closing(Services(well.settings)) as have:
        have.bundle = Bundle(bytes=older, sha256=hashlib.sha256(older).hexdigest())
        found = {item.part: item for item in diagnose(have)}
    assert found["agent"].severity is Severity.CRITICAL
    assert "another agent" in found["agent"].fault
