"""Commands for those who run Stoker: up, serve, worker, beat, sandbox, keys, db, doctor, sweep."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from infra import embedded
from infra.crypto import SecretBox
from infra.migrations import current, upgrade
from infra.settings import Settings
from infra.wiring import Services, utc_now
from orchestrator.api.ids import new_id
from orchestrator.checks import ready_checks
from orchestrator.cli.client import credentials_file
from orchestrator.cli.console import CliError, Exit, err, out, print_json
from orchestrator.cli.processes import beat_argv, become, program, web_argv, worker_argv
from state.diagram import markdown
from state.errors import StokerError
from state.events import ApiKey
from tasks.deallocate import Keeper, Swept
from tasks.deallocate import sweep as sweep_account

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
SCOPES = frozenset({"jobs:read", "jobs:write", "operator"})


def register(app: typer.Typer) -> None:
    for command in (up, serve, worker, beat, doctor, sweep, diagram):
        app.command()(command)
    for name, verbs, words in (
        ("keys", (create, ls, revoke, secret), "API keys, and the key for secrets at rest."),
        ("db", (db_upgrade, db_current), "The database's schema."),
        ("sandbox", (sandbox_serve,), "A Vast.ai of local processes, to rehearse on."),
    ):
        group = typer.Typer(help=words, no_args_is_help=True)
        for verb in verbs:
            group.command(verb.__name__.removeprefix(f"{name}_"))(verb)
        app.add_typer(group, name=name)


def here() -> Settings:
    """The settings of this installation; embedded servers that run here are filled in."""
    settings = Settings.from_env()
    return embedded.running(settings) or settings


# --- running it -------------------------------------------------------------------------------


def up(
    bind: Annotated[str, typer.Option(help="Address and port of the API.")] = "127.0.0.1:8400",
) -> None:
    """Run everything: web, worker, beat, and the servers that no setting names.

    Example: VAST_API_KEY=… STOKER_PUBLIC_URL=https://… stoker up
    """
    settings = dataclasses.replace(Settings.from_env(), bind=bind)
    over = _until_signal()
    with embedded.start(settings, progress=_say) as servers:
        settings = servers.settings
        prepare(settings)
        for name, argv in (
            ("web", web_argv(bind)),
            ("worker", worker_argv()),
            ("beat", beat_argv()),
        ):
            servers.run(program(name, argv, settings))
        key = _local_key(Services(settings))
        known = {"url": f"http://{bind}", "key": key}
        path = credentials_file(settings)
        path.touch(0o600)
        path.write_text(json.dumps(known))
        err.print(f"Stoker runs at http://{bind}; logs in {settings.data_dir / 'logs'}")
        err.print("next: stoker doctor, stoker train --help; Ctrl-C ends it", markup=False)
        try:
            over.wait()
        finally:
            path.unlink(missing_ok=True)
        err.print("ending …")


def _say(name: str, state: str) -> None:
    err.print(f"  {name}: {state}", markup=False)


def _until_signal() -> threading.Event:
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    return over


def prepare(settings: Settings) -> None:
    """Bring the database and the bucket into shape. Again is harmless."""
    upgrade(settings.database_url.reveal())
    Services(settings).storage.ensure_bucket()


def _local_key(have: Services) -> str:
    return make_key(have, owner="local", name="stoker up on this machine", scopes=SCOPES)


def serve(
    bind: Annotated[str, typer.Option(help="Address and port.")] = "",
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Run the web server (granian) in the foreground.

    Example: stoker serve --bind 0.0.0.0:8400
    """
    settings = _with_env(here())
    become(web_argv(bind or settings.bind, workers))


def worker(
    concurrency: Annotated[int, typer.Option(help="Tasks at the same time.")] = 16,
) -> None:
    """Run a Celery worker in the foreground. As many as wanted may run.

    Example: stoker worker --concurrency 32
    """
    _with_env(here())
    become(worker_argv(concurrency))


def beat() -> None:
    """Run Celery's beat in the foreground. A second one is harmless.

    Example: stoker beat
    """
    _with_env(here())
    become(beat_argv())


def _with_env(settings: Settings) -> Settings:
    os.environ.update(settings.to_env())
    return settings


def sandbox_serve(
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8410,
    base_models: Annotated[Path | None, typer.Option(help="Files for its Civitai.")] = None,
    time_scale: Annotated[float, typer.Option(help="Market seconds per second.")] = 1.0,
    boot: Annotated[float | None, typer.Option(help="Market seconds to boot a machine.")] = None,
    seed: Annotated[int, typer.Option(help="Of the market's offers.")] = 0,
) -> None:
    """Run a Vast.ai sandbox: real API, machines are local processes, nothing is spent.

    Example: stoker sandbox serve --port 8410, then VAST_URL=http://127.0.0.1:8410 stoker up
    """
    from infra.sandbox.server import running_sandbox

    key = os.environ.get("SANDBOX_ACCOUNT_KEY") or secrets.token_hex(16)
    over = _until_signal()
    with running_sandbox(
        account_key=key,
        base_model_dir=base_models,
        port=port,
        time_scale=time_scale,
        boot_s=boot,
        seed=seed,
    ) as sandbox:
        out.print(f"VAST_URL={sandbox.url}", markup=False)
        if "SANDBOX_ACCOUNT_KEY" not in os.environ:
            out.print(f"VAST_API_KEY={key}", markup=False)
        err.print("the sandbox runs; Ctrl-C ends it and its machines", markup=False)
        over.wait()


# --- keys and the database --------------------------------------------------------------------


def make_key(have: Services, *, owner: str, name: str, scopes: frozenset[str]) -> str:
    """A new API key; the text is returned once and only its hash is kept."""
    key = "stk_live_" + secrets.token_urlsafe(32)
    with have.store.transaction() as tx:
        tx.add_api_key(
            ApiKey(
                id=new_id("key", utc_now()),
                owner=owner,
                name=name,
                hash=hashlib.sha256(key.encode()).hexdigest(),
                scopes=scopes,
                created_at=utc_now(),
            )
        )
    return key


def create(
    name: Annotated[str, typer.Argument(help="Whom it is for.")],
    owner: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="jobs:read, jobs:write, operator")] = None,
) -> None:
    """Make an API key; it is shown once.

    Example: stoker keys create my-backend --scope jobs:read --scope jobs:write
    """
    scopes = frozenset(scope or ("jobs:read", "jobs:write"))
    if unknown := scopes - SCOPES:
        raise CliError(
            f"no such scope: {', '.join(sorted(unknown))}",
            "",
            f"known are {', '.join(sorted(SCOPES))}",
            Exit.USAGE,
        )
    out.print(make_key(Services(here()), owner=owner, name=name, scopes=scopes), markup=False)


def ls(as_json: AsJson = False) -> None:
    """List API keys; the keys themselves are not kept.

    Example: stoker keys ls
    """
    with Services(here()).store.transaction() as tx:
        keys = tx.api_keys()
    rows = [
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
    table = Table("ID", "NAME", "OWNER", "SCOPES", "REVOKED", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["id"]), str(row["name"]), str(row["owner"]),
            ", ".join(row["scopes"] or ()), str(row["revoked_at"] or ""),
        )  # fmt: skip
    out.print(table)


def revoke(key_id: Annotated[str, typer.Argument(help="As `stoker keys ls` shows it.")]) -> None:
    """Revoke an API key at once.

    Example: stoker keys revoke key_01JD…
    """
    with Services(here()).store.transaction() as tx:
        found = next((key for key in tx.api_keys() if key.id == key_id), None)
        if found is None:
            raise CliError(f"there is no key {key_id}", "", "stoker keys ls", Exit.NOT_FOUND)
        tx.save_api_key(dataclasses.replace(found, revoked_at=utc_now()))
    out.print(f"{key_id} is revoked", markup=False)


def secret() -> None:
    """Print a fresh key for STOKER_SECRET_KEYS (secrets at rest).

    Example: echo "STOKER_SECRET_KEYS=$(stoker keys secret)" >> .env
    """
    out.print(SecretBox.new_key().reveal(), markup=False)


def db_upgrade() -> None:
    """Bring the database to this version's schema. Again is harmless.

    Example: DATABASE_URL=… stoker db upgrade
    """
    url = _database_url()
    upgrade(url)
    out.print(f"the database is at {current(url)}", markup=False)


def db_current() -> None:
    """Print the database's schema revision.

    Example: stoker db current
    """
    out.print(str(current(_database_url())), markup=False)


def _database_url() -> str:
    url = here().database_url.reveal()
    if not url:
        raise CliError(
            "no database is named", "DATABASE_URL is not set", "set it, or run `stoker up`"
        )
    return url


# --- looking after it -------------------------------------------------------------------------

#: What to do about a part that is not well.
MENDS = {
    "database": "check DATABASE_URL, then `stoker db upgrade`",
    "redis": "check REDIS_URL; jobs go on slowly without Redis, nothing is lost",
    "s3": "check S3_ENDPOINT, S3_BUCKET and the AWS keys",
    "worker": "start `stoker worker`",
    "beat": "start `stoker beat`",
    "vast": "check VAST_API_KEY and the account's credit",
    "sweep": "see the worker's log: instances may be running unseen",
}


def doctor(as_json: AsJson = False) -> None:
    """Check every part; exit 3 when something is wrong.

    Example: stoker doctor
    """
    have = Services(here())
    checks: dict[str, Callable[[], str | None]] = {
        **ready_checks(have),
        "vast": lambda: _vast(have),
        "sweep": lambda: _swept(have),
    }
    rows = [(name, _fault(check)) for name, check in checks.items()]
    if as_json:
        print_json(
            {name: {"ok": not fault, "fault": fault, "mend": fault and MENDS[name]}
             for name, fault in rows}
        )  # fmt: skip
    else:
        for name, fault in rows:
            mark = "[green]✔[/]" if not fault else "[red]✘[/]"
            out.print(f"{mark} {name:9}", "well" if not fault else "", end="" if fault else "\n")
            if fault:
                out.print(f"{fault}\n    mend: {MENDS[name]}", markup=False)
    if any(fault for _, fault in rows):
        raise typer.Exit(int(Exit.DOCTOR))


def _fault(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except (StokerError, ValueError, OSError) as error:
        return str(error) or type(error).__name__
    except Exception as error:  # noqa: BLE001 -- the doctor names every fault, whatever it is
        return f"{type(error).__name__}"


def _vast(have: Services) -> str | None:
    account = have.provider.account()
    return None if account.credit > 0 else "the account has no credit"


def _swept(have: Services) -> str | None:
    with have.store.transaction() as tx:
        beats = tx.beats()
    if "sweep" not in beats:
        return "no sweep has compared the account with our leases yet"
    age = (have.clock() - beats["sweep"][0]).total_seconds()
    return f"the last sweep was {age:.0f} s ago" if age > 180 else None


def sweep(
    dry_run: Annotated[bool, typer.Option(help="Only say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the account's instances with our leases once; orphans go at the second sight.

    Example: stoker sweep --dry-run
    """
    have = Services(here())
    keeper = Keeper(store=have.store, provider=have.provider, clock=have.clock)
    swept: Swept = sweep_account(keeper, have.settings.deployment, dry_run=dry_run)
    if as_json:
        print_json(dataclasses.asdict(swept))
    elif swept.unreadable:
        err.print(f"the list could not be read, nothing was done: {swept.unreadable}", markup=False)
    else:
        words: dict[str, Any] = dataclasses.asdict(swept)
        out.print(", ".join(f"{name}: {value or 0}" for name, value in words.items()), markup=False)
    if swept.unreadable:
        raise typer.Exit(int(Exit.FAILED))


def diagram() -> None:
    """Print docs/states.md, drawn from the state machine's table.

    Example: stoker diagram > docs/states.md
    """
    out.print(markdown(), markup=False, end="")
