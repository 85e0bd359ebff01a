"""Commands for those who run Stoker: up, serve, worker, beat, keys, db, sweep.

What reaches databases, storage and markets is imported by the functions that need it: this module
is loaded for the help of every command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import requests
import typer

from infra import embedded
from infra.crypto import SecretBox
from infra.settings import Settings, SettingsError
from orchestrator.api.ids import new_id
from orchestrator.api.keys import LIVE_PREFIX, TEST_OWNER, TEST_PREFIX, hash_of, is_test
from orchestrator.cli.client import beside, beside_file
from orchestrator.cli.console import CliError, Exit, err, out, print_json, print_rows
from orchestrator.cli.processes import (
    QUEUES,
    address,
    beat_argv,
    become,
    check_free,
    last_line,
    metrics_env,
    programs,
    until_signal,
    web_argv,
    worker_argv,
)
from state import brakes
from state.diagram import markdown
from state.errors import StokerError
from state.events import ApiKey

if TYPE_CHECKING:
    from infra.wiring import Services
    from tasks.deallocate import Sight

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
SCOPES = frozenset({"jobs:read", "jobs:write", "operator"})
#: What the scopes of a test key say besides.
TEST_SCOPE = "test"
#: The name of the key that `up` makes for commands on its machine.
LOCAL_KEY = "stoker up on this machine"
#: Listening there is listening everywhere; calling there is calling ourselves.
ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 -- only compared with
#: Seconds for the web process to answer.
READY_S = 30.0


def register(app: typer.Typer) -> None:
    for command in (up, serve, worker, beat, sweep, diagram):
        app.command()(command)
    app.command("stop-renting")(stop_renting)
    app.command("resume-renting")(resume_renting)
    for name, verbs, words in (
        ("keys", (create, ls, revoke, secret), "API keys, and the key for secrets at rest."),
        ("db", (db_upgrade, db_current), "The database's schema."),
    ):
        group = typer.Typer(help=words, no_args_is_help=True)
        for verb in verbs:
            group.command(verb.__name__.removeprefix(f"{name}_"))(verb)
        app.add_typer(group, name=name)


def here(*, demo: bool = True) -> Settings:
    """The settings of this installation: the environment's, then those of what runs here."""
    settings = Settings.from_env()
    known = beside(settings, demo=demo)
    if known is not None:
        given = {name: value for name, value in os.environ.items() if value}
        return Settings.from_env({**known["env"], **given})
    return embedded.running(settings) or settings


def services(settings: Settings | None = None) -> Services:
    """What is behind an installation; without `settings`, behind this one."""
    from infra.wiring import Services

    return Services(settings or here())


# --- running it -------------------------------------------------------------------------------


def up(
    bind: Annotated[
        str, typer.Option(help="Address of the API; default: STOKER_BIND, 127.0.0.1:8400.")
    ] = "",
) -> None:
    """Run everything: web, worker, beat, and the servers that no setting names.

    Example: VAST_API_KEY=… STOKER_PUBLIC_URL=https://… stoker up
    """
    settings = _settings_of_up(bind)
    host, port = address(settings.bind)
    check_free(host, port, f"end it, or `stoker up --bind {host}:{port + 10}`")
    over = until_signal()
    with embedded.start(settings, progress=_say) as servers:
        settings = servers.settings
        prepare(settings)
        for item in programs(settings):
            servers.run(item)
        url = f"http://{'127.0.0.1' if host in ANY_HOST else host}:{port}"
        _until_answers(url, settings, over)
        with _local_client(url, settings):
            err.print(f"Stoker runs at {url}; logs in {settings.data_dir / 'logs'}", markup=False)
            if is_local(settings.public_url) and settings.vast_url == Settings.vast_url:
                err.print(
                    f"warning: rented machines cannot reach {settings.public_url}; "
                    "set STOKER_PUBLIC_URL",
                    markup=False,
                )
            err.print("next: `stoker doctor`, `stoker train --help`; Ctrl-C ends it", markup=False)
            err.print(
                "the pages want an operator's key: `stoker keys create me --scope operator`",
                markup=False,
            )
            over.wait()
        err.print("ending …")


def _settings_of_up(bind: str) -> Settings:
    settings = Settings.from_env()
    if not settings.vast_api_key.reveal():
        raise CliError(
            "VAST_API_KEY is not set",
            "without it no GPU can be rented, nor any be given back",
            "set it (Vast.ai shows it under Account), or rehearse: `stoker sandbox serve`",
            Exit.USAGE,
        )
    settings = dataclasses.replace(settings, bind=bind or settings.bind)
    host, port = address(settings.bind)
    nearest = f"http://{'127.0.0.1' if host in ANY_HOST else host}:{port}"
    settings = dataclasses.replace(settings, test_url=settings.test_url or nearest)
    if settings.public_url == Settings.public_url:  # not set: at least it is the right port
        settings = dataclasses.replace(settings, public_url=nearest)
    return settings


def _until_answers(url: str, settings: Settings, over: threading.Event) -> None:
    """Wait for the web process. Raises: CliError, when it does not come."""
    _say("web, worker, beat", "starting")
    deadline = time.monotonic() + READY_S
    while not over.wait(0.1):
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/healthz", timeout=5).ok:
                _say("web, worker, beat", "ready")
                return
        if time.monotonic() > deadline:
            log = settings.data_dir / "logs" / "web.log"
            raise CliError("the web process does not answer", last_line(log), f"its log is {log}")


@contextlib.contextmanager
def _local_client(url: str, settings: Settings) -> Iterator[None]:
    """A key for commands on this machine, good for as long as the block runs."""
    have = services(settings)
    for stale in _local_keys(have):  # of one that was killed
        revoke_key(have, stale)
    key = make_key(have, owner="local", name=LOCAL_KEY, scopes=SCOPES)
    try:
        with left_beside(url, key, settings):
            yield
    finally:
        for name in _local_keys(have):
            revoke_key(have, name)


@contextlib.contextmanager
def left_beside(url: str, key: str, settings: Settings) -> Iterator[None]:
    """Commands in the same directory find this installation for as long as the block runs."""
    path = beside_file(settings.data_dir)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({"url": url, "key": key, "pid": os.getpid(), "env": settings.to_env()}, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _local_keys(have: Services) -> list[str]:
    with have.store.transaction() as tx:
        return [key.id for key in tx.api_keys() if key.name == LOCAL_KEY and not key.revoked_at]


def _say(name: str, state: str) -> None:
    err.print(f"  {name}: {state}", markup=False)


def prepare(settings: Settings) -> None:
    """Bring the database and the bucket into shape. Again is harmless."""
    from infra.migrations import upgrade

    upgrade(settings.database_url.reveal())
    ready_store(settings)


def ready_store(settings: Settings) -> None:
    """Make the bucket where it is missing, and see that our pages may upload to it, or say that
    they may not. Raises: StorageError, when the store cannot be asked."""
    storage = services(settings).storage
    storage.ensure_bucket()
    parts = urlsplit(settings.public_url)
    origin = f"{parts.scheme}://{parts.netloc}"
    if storage.fault_for_browsers(origin) is None:
        return
    try:
        storage.allow_browsers(origin)
        fault = storage.fault_for_browsers(origin)
    except StokerError as error:
        fault = str(error)
    if fault:
        err.print(
            f"warning: the page New training cannot upload photographs: {fault}; add a CORS rule "
            f"to the bucket for PUT with Content-Type from {origin}",
            markup=False,
        )


def serve(
    bind: Annotated[
        str, typer.Option(help="Address and port; default: STOKER_BIND, 127.0.0.1:8400.")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Run the web server (granian) in the foreground.

    Example: stoker serve --bind 0.0.0.0:8400
    """
    settings = _ready_to_run()
    where = bind or settings.bind
    host, port = address(where)
    check_free(host, port, f"end it, or `stoker serve --bind {host}:{port + 10}`")
    try:
        ready_store(settings)
    except StokerError as error:  # it may come later; `readyz` says so until then
        err.print(f"warning: {error}; next: `stoker doctor`", markup=False)
    with contextlib.suppress(OSError):  # a read-only place: each process counts for itself
        os.environ.update(metrics_env(settings))
    become(web_argv(where, workers))


def worker(
    concurrency: Annotated[int, typer.Option(min=1, help="Tasks at the same time.")] = 16,
    queues: Annotated[
        str, typer.Option(help="Which tasks: stoker (all but webhooks), relay (webhooks), or both.")
    ] = QUEUES,
) -> None:
    """Run a Celery worker in the foreground. As many as wanted may run.

    Example: stoker worker --concurrency 32
    """
    if not _ready_to_run().vast_api_key.reveal():
        raise SettingsError("VAST_API_KEY is not set; Vast.ai shows it under Account")
    become(worker_argv(concurrency, queues))


def beat() -> None:
    """Run Celery's beat in the foreground. A second one is harmless.

    Example: stoker beat
    """
    _ready_to_run()
    become(beat_argv())


def _ready_to_run() -> Settings:
    """This installation's settings, put into the environment of what this process becomes.

    Raises:
        SettingsError: one that every process needs is missing.
    """
    settings = here(demo=False)  # to which no process of an installation belongs
    for name, value in (
        ("DATABASE_URL", settings.database_url.reveal()),
        ("REDIS_URL", settings.redis_url.reveal()),
        ("STOKER_SECRET_KEYS", settings.secret_keys),
    ):
        if not value:
            raise SettingsError(f"{name} is not set; `stoker up` brings what is missing")
    os.environ.update(settings.to_env())
    return settings


# --- keys and the database --------------------------------------------------------------------


def make_key(
    have: Services, *, owner: str, name: str, scopes: frozenset[str], test: bool = False
) -> str:
    """A new API key; the text is returned once and only its hash is kept. With `test` one that
    only rehearses; its scopes then say so too, for lists of keys."""
    key = (TEST_PREFIX if test else LIVE_PREFIX) + secrets.token_urlsafe(32)
    with have.store.transaction() as tx:
        tx.add_api_key(
            ApiKey(
                id=new_id("key", have.clock()),
                owner=owner,
                name=name,
                hash=hash_of(key),
                scopes=scopes | {TEST_SCOPE} if test else scopes,
                created_at=have.clock(),
            )
        )
    return key


def create(
    name: Annotated[str, typer.Argument(help="Whom it is for.")],
    owner: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="jobs:read, jobs:write, operator")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Rehearses: its jobs rent nothing and cost nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an API key; it is shown once.

    Example: stoker keys create my-backend --scope jobs:read --scope jobs:write

    JSON: {key, name, owner, scopes}.
    """
    scopes = frozenset(scope or ("jobs:read", "jobs:write"))
    if unknown := scopes - SCOPES:
        raise CliError(
            f"no such scope: {', '.join(sorted(unknown))}",
            "",
            f"known are {', '.join(sorted(SCOPES))}",
            Exit.USAGE,
        )
    if test and "operator" in scopes:
        raise CliError(
            "a test key is no operator's",
            "it sees what test keys of its owner made, and nothing else",
            "leave out --scope operator, or --test",
            Exit.USAGE,
        )
    if is_test(owner):
        raise CliError(
            f"no owner may be called {owner!r}",
            f"a test key of {owner.removesuffix(TEST_OWNER)!r} acts for an owner of that name",
            "another --owner, or --test",
            Exit.USAGE,
        )
    key = make_key(services(), owner=owner, name=name, scopes=scopes, test=test)
    if as_json:
        print_json({"key": key, "name": name, "owner": owner, "scopes": sorted(scopes)})
        return
    print(key)
    err.print("it is shown this once; send it as `Authorization: Bearer …`", markup=False)


def ls(as_json: AsJson = False) -> None:
    """List API keys; the keys themselves are not kept.

    Example: stoker keys ls

    JSON: [{id, name, owner, scopes, created_at, revoked_at}]; `revoked_at` is null while it is
    good.
    """
    with services().store.transaction() as tx:
        keys = tx.api_keys()
    rows: list[dict[str, Any]] = [
        {
            "id": key.id,
            "name": key.name,
            "owner": key.owner,
            "scopes": sorted(key.scopes),
            "created_at": key.created_at.isoformat(),
            "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
        }
        for key in keys
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        err.print("no keys; `stoker keys create NAME` makes one", markup=False)
        return
    title = ("ID", "NAME", "OWNER", "REVOKED", "SCOPES")
    print_rows(out, [title, *(_key_row(row) for row in rows)])


def _key_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    revoked = (row["revoked_at"] or "-")[:19]
    return row["id"], row["name"], row["owner"], revoked, " ".join(row["scopes"])


def revoke(
    key_id: Annotated[str, typer.Argument(help="As `stoker keys ls` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Revoke an API key at once.

    Example: stoker keys revoke key_01JD…

    JSON: {id, revoked}.
    """
    if not revoke_key(services(), key_id):
        raise CliError(
            f"there is no key {key_id}", "", "`stoker keys ls` lists them", Exit.NOT_FOUND
        )
    _done(f"{key_id} is revoked", {"id": key_id, "revoked": True}, as_json)


def revoke_key(have: Services, key_id: str) -> bool:
    """Whether there was such a key. One that is revoked already stays as it is."""
    with have.store.transaction() as tx:
        found = next((key for key in tx.api_keys() if key.id == key_id), None)
        if found is not None and found.revoked_at is None:
            tx.save_api_key(dataclasses.replace(found, revoked_at=have.clock()))
    return found is not None


def secret() -> None:
    """Print a fresh key for STOKER_SECRET_KEYS (secrets at rest).

    Example: echo "STOKER_SECRET_KEYS=$(stoker keys secret)" >> .env
    """
    print(SecretBox.new_key().reveal())


def db_upgrade(as_json: AsJson = False) -> None:
    """Bring the database to this version's schema. Again is harmless.

    Example: DATABASE_URL=… stoker db upgrade

    JSON: {revision, newest}.
    """
    from infra.migrations import current, newest, upgrade

    url = _database_url()
    upgrade(url)
    now = current(url)
    _done(f"the database is at {now}", {"revision": now, "newest": newest()}, as_json)


def db_current(as_json: AsJson = False) -> None:
    """Print the database's schema revision.

    Example: stoker db current

    JSON: {revision, newest}; `revision` is null before the first upgrade.
    """
    from infra.migrations import current, newest

    now = current(_database_url())
    if as_json:
        print_json({"revision": now, "newest": newest()})
        return
    out.print(now or "none", markup=False)
    if now != newest():
        err.print(f"this version needs {newest()}: `stoker db upgrade`", markup=False)


def _done(words: str, document: Mapping[str, Any], as_json: bool) -> None:
    """What was done: a sentence, or a document for programs."""
    if as_json:
        print_json(document)
    else:
        out.print(words, markup=False)


def _database_url() -> str:
    url = here().database_url.reveal()
    if not url:
        raise CliError(
            "no database is named",
            "DATABASE_URL is not set, and no `stoker up` runs here",
            "set it, or run `stoker up`",
            Exit.USAGE,
        )
    if not url.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise SettingsError("DATABASE_URL is no PostgreSQL address; it begins with postgresql://")
    return url


# --- looking after it -------------------------------------------------------------------------


def is_local(url: str) -> bool:
    """Whether only this machine, or its own network, can reach `url`."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost", ".internal"))


def sweep(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the account's instances with our leases once; orphans go at the second sight.

    Example: stoker sweep --dry-run

    JSON: {seen, ours, destroyed, suspects, lost, unreadable, doubtful, sights: [{instance,
    label, machine, age_s, price, verdict, why}]}; prices are micro-USD per hour.
    """
    from tasks.deallocate import Keeper
    from tasks.deallocate import sweep as sweep_account

    have = services()
    keeper = Keeper(
        store=have.store,
        provider=have.provider,
        clock=have.clock,
        image_bytes=have.settings.image_bytes,
    )
    swept = sweep_account(keeper, have.settings.deployment, dry_run=dry_run)
    if as_json:
        print_json(dataclasses.asdict(swept))
        if swept.unreadable:
            raise typer.Exit(int(Exit.FAILED))
        return
    if swept.unreadable:
        raise CliError(
            "the account's list could not be read, so nothing was done",
            swept.unreadable,
            "`stoker doctor` looks at Vast",
        )
    title = ("INSTANCE", "LABEL", "MACHINE", "AGE", "$/h", "VERDICT", "WHY")
    if not swept.sights:
        err.print("the account has no instance", markup=False)
    else:
        print_rows(out, [title, *(_sight_row(item, dry_run) for item in swept.sights)])
    if swept.doubtful:
        err.print("the list shows none of our machines; it is not believed yet", markup=False)
    for lease in swept.lost:
        err.print(f"{lease}: its machine is gone; its job was told", markup=False)


def _sight_row(item: Sight, dry_run: bool) -> tuple[str, ...]:
    verdict = "to destroy" if dry_run and item.verdict == "destroyed" else item.verdict
    age = f"{item.age_s // 3600}h{item.age_s % 3600 // 60:02d}m"
    price = f"{item.price / 1_000_000:.3f}"
    return item.instance, item.label or "-", item.machine, age, price, verdict, item.why


def stop_renting(
    why: Annotated[str, typer.Option(help="For those who ask why jobs wait.")] = "",
    as_json: AsJson = False,
) -> None:
    """Rent nothing from now on, in every process; releasing goes on. Jobs wait.

    Example: stoker stop-renting --why "prices doubled"

    JSON: {renting, why}.
    """
    _switch(services(), stopped=True, why=why)
    words = "renting is stopped; `stoker resume-renting` lets it go on"
    _done(words, {"renting": False, "why": why}, as_json)


def resume_renting(as_json: AsJson = False) -> None:
    """Rent again after `stop-renting`.

    Example: stoker resume-renting

    JSON: {renting, why}.
    """
    have = services()
    _switch(have, stopped=False, why="")
    held = have.settings.kill_switch
    _done("renting goes on", {"renting": not held, "why": ""}, as_json)
    if held:
        err.print("but STOKER_KILL_SWITCH is set, and stops it still", markup=False)


def _switch(have: Services, *, stopped: bool, why: str) -> None:
    with have.store.transaction() as tx:
        brakes.switch(tx, stopped=stopped, why=why, now=have.clock())


def diagram() -> None:
    """Print docs/states.md, drawn from the state machine's table.

    Example: stoker diagram > docs/states.md
    """
    out.print(markdown(), markup=False, end="")
