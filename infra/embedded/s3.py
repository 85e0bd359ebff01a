"""S3 on this machine: OpenStack Swift with its s3api, which checks signatures and expiry.

Its account, container, object and proxy servers run in one process (`swiftd`), each on a port of
127.0.0.1. Objects are files with extended attributes; without those there is no Swift.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import sys
from pathlib import Path

from infra.embedded.errors import EmbeddedError
from infra.embedded.program import Program

_COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {conf}
devices = {devices}
mount_check = false
# Swift insists on syslog: nobody listens there. What matters goes to our log file.
log_udp_host = 127.0.0.1
log_udp_port = 9
log_level = ERROR
log_custom_handlers = __main__.log_to_stderr

"""

_BACKEND = """\
[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
log_requests = false
"""

_PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth copy slo dlo versioned_writes proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = false
conn_timeout = 2
node_timeout = 60
recoverable_node_timeout = 60
# Browsers upload from the pages. Any origin may: it is the signature in the URL that admits.
cors_allow_origin = *

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:healthcheck]
use = egg:swift#healthcheck

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api
location = {region}
s3_acl = false
dns_compliant_bucket_names = true
cors_preflight_allow_origin = *

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {secret} .admin

[filter:copy]
use = egg:swift#copy

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo

[filter:versioned_writes]
use = egg:swift#versioned_writes
"""  # noqa: E501 -- a pipeline is one line

_SWIFT = """\
[swift-hash]
swift_hash_path_suffix = {suffix}
swift_hash_path_prefix = stoker

[storage-policy:0]
name = one
default = yes
"""


def check_possible(directory: Path) -> None:
    """Raises `EmbeddedError` where Swift cannot run in `directory`, saying why."""
    if importlib.util.find_spec("swift") is None:
        raise EmbeddedError(
            "the embedded S3 (OpenStack Swift) is not installed here",
            "install stoker[embedded] on Linux, or set S3_ENDPOINT and the AWS_ variables",
        )
    probe = directory / ".xattr"
    probe.touch()
    try:
        os.setxattr(probe, "user.stoker", b"1")
    except OSError as exc:
        raise EmbeddedError(
            f"the file system of {directory} has no extended attributes "
            f"({exc.strerror}); the embedded S3 keeps its metadata in them",
            "set STOKER_DATA to a directory on ext4, xfs or btrfs, or set S3_ENDPOINT",
        ) from exc
    finally:
        probe.unlink()


def configure(
    root: Path, ports: dict[str, int], *, access_key: str, secret_key: str, region: str
) -> Program:
    """Write Swift's files under `root`; what is to be run.

    `ports` names one for each of account, container, object and proxy.
    """
    conf, devices = root / "conf", root / "devices"
    conf.mkdir(parents=True, exist_ok=True)
    (devices / "d1").mkdir(parents=True, exist_ok=True)
    account, _, user = access_key.partition(":")
    _write(conf / "swift.conf", _SWIFT.format(suffix=_hash_suffix(root)))
    for name, port in ports.items():
        common = _COMMON.format(port=port, conf=conf, devices=devices)
        body = (
            _PROXY.format(region=region, account=account, user=user, secret=secret_key)
            if name == "proxy"
            else _BACKEND.format(name=name)
        )
        _write(conf / f"{name}.conf", common + body)
    return Program(
        name="s3",
        argv=(sys.executable, "-P", str(Path(__file__).with_name("swiftd.py")), str(conf)),
        log=root / "log",
        cwd=root,
        stop="SIGTERM",
    )


def _hash_suffix(root: Path) -> str:
    """Where objects lie on the disk depends on it, so it is made once."""
    path = root / "hash-suffix"
    if not path.exists():
        _write(path, os.urandom(8).hex())
    return path.read_text().strip()


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def ready(port: int) -> bool:
    """Whether the proxy answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
