"""What is wrong with an installation: every part is looked at, and each fault has its mend."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import queue
import secrets as random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from gpu_agent import wire
from infra import logs, probes
from infra.crypto import SecretBox
from infra.settings import Settings, SettingsError, table
from infra.wiring import Services
from orchestrator.checks import STALE, proof, ready_checks
from orchestrator.cli.console import count_words
from orchestrator.cli.servers import is_local
from orchestrator.health import version_here
from state import alarms, money
from state.alarms import Severity
from state.endpoints import Endpoint
from state.errors import AccountFault, NotFound, StokerError, StorageError, StoreUnavailable
from state.events import OutgoingStatus, Secret

#: Seconds that a part may take; one that takes longer is not well.
DEADLINE_S = 15.0
#: A clock that is off by more is worth a word, and by more than the second, a fault: signatures
#: are refused at five minutes, and deadlines are missed before.
SKEW_S, WRONG_S = 5.0, 60.0
#: Free bytes of `data_dir`, likewise.
LITTLE_SPACE, NO_SPACE = 2_000_000_000, 200_000_000
#: A certificate that ends so soon is worth a word.
ENDING = timedelta(days=14)
#: A webhook that waits so long is worth a word, and what was given up within a day.
WAITING, GIVEN_UP = timedelta(minutes=10), timedelta(days=1)
#: Alarms that parts tell of.
SAID = frozenset({"worker.stale", "beat.stale", "sweep.stale", "credit.gone", "credit.unread"})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one part.

    Attributes:
        fault: in a line, without secrets; empty when the part is well.
        severity: of the fault; a warning alone is no reason to end with 3.
        mend: what to do about it.
        seen: of a part that is well, what was seen.
        behind: a part that must be well before this one can be told.
    """

    part: str
    fault: str = ""
    severity: Severity = Severity.CRITICAL
    mend: str = ""
    seen: str = ""
    behind: str = ""

    def row(self) -> dict[str, Any]:
        """Its stable shape in JSON."""
        return {
            "part": self.part,
            "ok": not self.fault,
            "severity": self.severity.value if self.fault else None,
            "fault": self.fault or None,
            "mend": self.mend or None,
            "seen": self.seen or None,
        }


#: What a check answers: what it saw, or a fault, its mend, and how bad it is.
Seen = str
Fault = tuple[str, str, Severity]
Check = Callable[[Services], "Seen | Fault"]


# --- looking ------------------------------------------------------------------------------------


def diagnose(
    have: Services,
    *,
    say: Callable[[Sequence[str]], None] = lambda names: None,
    deadline_s: float = DEADLINE_S,
) -> list[Finding]:
    """Look at all parts at the same time; always in the same order. What needs the database
    waits for it. `say` hears which are still being looked at."""
    found = _all(have, FIRST, say, deadline_s)
    if all(not item.fault for item in found if item.part in ("database", "schema")):
        found += _all(have, BEHIND_DATABASE, say, deadline_s)
        found += _standing(have)
    else:
        found += [Finding(part=name, fault="not asked") for name in BEHIND_DATABASE]
    order = {name: place for place, name in enumerate(ORDER)}
    return sorted(_blamed(found), key=lambda item: order.get(item.part, len(order)))


def _blamed(found: Sequence[Finding]) -> list[Finding]:
    """One fault is told once: what is not well because another part is not, says so alone."""
    red = {item.part for item in found if item.fault and item.severity is Severity.CRITICAL}
    told = []
    for item in found:
        behind = next((part for part in BEHIND.get(item.part, ()) if part in red), "")
        if item.fault and behind:
            item = Finding(
                part=item.part,
                fault=f"cannot be told before {behind} is well",
                severity=Severity.WARNING,
                mend=f"mend {behind} first",
                behind=behind,
            )
        told.append(item)
    return told


def _all(
    have: Services,
    checks: Mapping[str, Check],
    say: Callable[[Sequence[str]], None],
    deadline_s: float,
) -> list[Finding]:
    done: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    for name, check in checks.items():
        # daemons: one that hangs must not keep us from ending
        run = threading.Thread(target=lambda n=name, c=check: done.put(_one(n, c, have)))
        run.daemon = True
        run.start()
    found: dict[str, Finding] = {}
    until = time.monotonic() + deadline_s
    while len(found) < len(checks):
        say([name for name in checks if name not in found])
        try:
            item = done.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        found[item.part] = item
    late = f"did not answer within {deadline_s:g} s"
    return [
        found.get(name) or Finding(part=name, fault=late, mend=LATE.get(name, "try again"))
        for name in checks
    ]


def _one(name: str, check: Check, have: Services) -> Finding:
    mend = LATE.get(name, "see the logs")
    try:
        answer = check(have)
    except (StokerError, SettingsError) as error:
        answer = str(error) or type(error).__name__, mend, Severity.CRITICAL
    except requests.RequestException as error:
        answer = probes.why(error), mend, Severity.CRITICAL
    except Exception as error:  # noqa: BLE001 -- the doctor names every fault, whatever it is
        # its text might hold a URL with a password
        answer = type(error).__name__, mend, Severity.CRITICAL
    if isinstance(answer, str):
        return Finding(part=name, seen=answer)
    fault, mend, severity = answer
    return Finding(part=name, fault=fault, mend=mend, severity=severity)


def _fault(words: str, mend: str) -> Fault:
    return words, mend, Severity.CRITICAL


def _warning(words: str, mend: str) -> Fault:
    return words, mend, Severity.WARNING


def scrubbed(item: Finding, settings: Settings) -> Finding:
    """`item` on one line, with no secret of `settings` in it, nor anything that looks like one."""

    def clean(text: str) -> str:
        for hidden in _hidden(settings):
            text = text.replace(hidden, logs.STARS)
        return logs.mask(" ".join(text.split()))[:400]

    return replace(item, fault=clean(item.fault), mend=clean(item.mend), seen=clean(item.seen))


def _hidden(settings: Settings) -> list[str]:
    """Every secret of `settings`, the longest first, also as URLs write them."""
    found: set[str] = set()
    for setting in table():
        value = setting.of(settings)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Secret):
                found |= {one.reveal(), urlsplit(one.reveal()).password or ""}
    found |= {quote(text, safe="") for text in found}
    return sorted((text for text in found if len(text) >= 4), key=len, reverse=True)


# --- the parts ----------------------------------------------------------------------------------


def _database(have: Services) -> Seen | Fault:
    url = have.settings.database_url.reveal()
    if not url:
        return _fault(
            "DATABASE_URL is not set, and no `stoker up` runs here", "set it, or run `stoker up`"
        )
    try:
        seen = probes.database(url)
    except ValueError as error:
        return _fault(str(error), "correct DATABASE_URL; it begins with postgresql://")
    except StoreUnavailable as error:
        return _fault(str(error), "start PostgreSQL, or correct DATABASE_URL")
    return f"PostgreSQL {seen.version}"


def _schema(have: Services) -> Seen | Fault:
    seen = probes.database(have.settings.database_url.reveal())
    if seen.revision == seen.newest:
        return f"at {seen.revision}"
    words = f"at {seen.revision or 'no revision'}; this version needs {seen.newest}"
    if seen.revision is not None and seen.revision > seen.newest:
        return _fault(words, "run the newer Stoker that made it")
    return _fault(words, "`stoker db upgrade`")


def _secrets(have: Services) -> Seen | Fault:
    keys = have.settings.secret_keys
    mend = "put the key that is missing behind the others in STOKER_SECRET_KEYS"
    if not keys:
        return _fault("STOKER_SECRET_KEYS is not set", "`stoker keys secret` makes one")
    try:
        box = SecretBox(keys)
    except ValueError as error:
        return _fault(str(error), "correct STOKER_SECRET_KEYS; `stoker keys secret` makes one")
    tried, lost = probes.sealed(have.settings.database_url.reveal(), box)
    if lost:
        return _fault(f"{lost} of {tried} stored secrets open with none of the keys", mend)
    return f"{count_words(tried, 'stored secret')} can be opened"


def _redis(have: Services) -> Seen | Fault:
    if not have.settings.redis_url.reveal():
        return _fault(
            "REDIS_URL is not set, and no `stoker up` runs here", "set it, or run `stoker up`"
        )
    fault = ready_checks(have)["redis"]()
    if fault:
        return _fault(fault, "start Redis, or correct REDIS_URL; nothing is lost meanwhile")
    return "answers"


def _heard(name: str, of: str, mend: str) -> Check:
    """A part that gives signs of life in the database under `of`."""

    def check(have: Services) -> Seen | Fault:
        with have.store.transaction() as tx:
            beats = tx.beats()
        if of not in beats:
            return _fault("was never heard of", mend)
        age = have.clock() - beats[of][0]
        limit = alarms.UNSWEPT if name == "sweep" else STALE
        if age > limit:
            return _fault(f"was last heard {_span(age)} ago", mend)
        return f"was heard {_span(age)} ago"

    return check


def _span(span: timedelta) -> str:
    """`12 s`, `3 min`, `5 h`, `2 d`."""
    seconds = max(0.0, span.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _vast(have: Services) -> Seen | Fault:
    settings = have.settings
    if not settings.vast_api_key.reveal():
        return _fault("VAST_API_KEY is not set", "set it; Vast.ai shows it under Account")
    try:
        account = have.provider.account()
    except AccountFault as error:
        return _fault(str(error), "correct VAST_API_KEY; Vast.ai shows it under Account")
    if account.credit <= 0:
        return _fault(
            f"the account has {money.dollars(account.credit)} of credit",
            "add credit at Vast.ai; it stops all machines without",
        )
    where = "" if settings.vast_url == Settings.vast_url else f" at {settings.vast_url}"
    return f"{money.dollars(account.credit)} of credit{where}"


def _s3(have: Services) -> Seen | Fault:
    settings = have.settings
    real = settings.vast_url == Settings.vast_url
    if settings.s3_endpoint and real and is_local(settings.s3_endpoint):
        return _fault(
            f"rented machines cannot reach {settings.s3_endpoint}",
            "set S3_ENDPOINT to a public address",
        )
    try:
        have.storage.check()
        probes.round_trip(have.storage, f"checks/{random.token_hex(8)}", b"doctor")
    except NotFound as error:
        return _fault(str(error), f"create the bucket {settings.s3_bucket}, or correct S3_BUCKET")
    except StorageError as error:
        if error.code == "storage_refused" and not error.retryable:
            return _fault(str(error), "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        named = settings.s3_endpoint or settings.s3_access_key
        return _fault(str(error), LATE["s3"] if named else "set S3_ENDPOINT and the AWS keys")
    return f"put, got and deleted in {settings.s3_bucket}"


def _cors(have: Services) -> Seen | Fault:
    parts = urlsplit(have.settings.public_url)
    origin = f"{parts.scheme}://{parts.netloc}"
    fault = have.storage.fault_for_browsers(origin)
    if fault is None:
        return f"pages of {origin} may upload"
    mend = f"let {origin} PUT to the bucket in its CORS rules; only the pages' uploads need it"
    return _warning(fault, mend)


def _public(have: Services) -> Seen | Fault:
    """As far as can be told from here: its name, its certificate, and that we are behind it."""
    settings = have.settings
    url, parts = settings.public_url, urlsplit(settings.public_url)
    real = settings.vast_url == Settings.vast_url
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return _fault(f"{url!r} is no address", LATE["public"])
    if real and is_local(url):
        return _fault(f"rented machines cannot reach {url}", LATE["public"])
    try:
        found = probes.addresses(parts.hostname, parts.port or 443)
    except OSError:
        return _fault(f"the name {parts.hostname} is not known", "correct it, or its DNS entry")
    try:
        answer = probes.ask("GET", f"{url}/healthz")
    except requests.RequestException as error:
        mend = "renew it" if probes.untrusted(error) else "start `stoker serve`"
        words = f"{url} does not answer: {probes.why(error)}"
        return _fault(words, f"{mend}, or correct STOKER_PUBLIC_URL")
    if answer.status_code != 200 or _json(answer).get("status") != "alive":
        words = f"{url}/healthz answers {answer.status_code}, and not as Stoker does"
        return _fault(words, "correct STOKER_PUBLIC_URL, or what stands in front of `stoker serve`")
    doubt = _ours(have) or (_doubtful(url, found, have.clock()) if real else None)
    return doubt or f"{url} is this installation"


def _ours(have: Services) -> Fault | None:
    """Whether the same installation answers there, and of this version."""
    url, challenge = have.settings.public_url, random.token_hex(16)
    known = _json(probes.ask("GET", f"{url}/version?challenge={challenge}"))
    proofs = {proof(key, challenge) for key in have.settings.secret_keys}
    if proofs and known.get("proof") not in proofs:
        words = f"{url} is another installation, or has other keys for secrets"
        return _fault(words, "correct STOKER_PUBLIC_URL, or STOKER_SECRET_KEYS there or here")
    if known.get("version") != version_here():
        words = f"version {known.get('version')} answers at {url}, and this is {version_here()}"
        return _warning(words, "restart `stoker serve`")
    return None


def _doubtful(url: str, found: Sequence[str], now: datetime) -> Fault | None:
    """What may be right, and is mostly not, where machines come from the real market."""
    if inside := [item for item in found if not ipaddress.ip_address(item).is_global]:
        words = f"{urlsplit(url).hostname} is {inside[0]} here, which is no public address"
        return _warning(words, "see that rented machines resolve it to a public one")
    if not url.startswith("https://"):
        return _warning(f"{url} is without TLS", "put a proxy with a certificate in front")
    left = probes.certificate_ends(url) - now
    if left < ENDING:
        return _warning(f"its certificate ends in {_span(left)}", "renew it")
    return None


def _json(answer: requests.Response) -> Mapping[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _receiver(have: Services) -> Seen | Fault:
    """A report signed by nobody whom we know: where it is refused as we refuse it, those that are
    well signed pass everything that stands before us too."""
    body = b"{}"
    signed = wire.sign(
        body,
        secrets=[wire.new_secret()],
        webhook_id=f"doctor_{random.token_hex(8)}",
        at=have.clock().timestamp(),
    )
    path = "/agent/v1/jobs/job_doctor/attempts/1/reports"
    headers = {**signed, "Content-Type": "application/json"}
    mend = "let POSTs to /agent/v1/ pass unchanged what stands in front of `stoker serve`"
    answer = probes.ask("POST", have.settings.public_url + path, data=body, headers=headers)
    if answer.status_code != 401 or _json(answer).get("code") != "bad_signature":
        return _fault(f"a report was answered {answer.status_code}, and not by Stoker", mend)
    return "a signed report arrives, and a wrong signature is refused"


def _webhooks(have: Services) -> Seen | Fault:
    """Whether customers are reached; who is not, is named with the endpoint's host alone."""
    now = have.clock()
    with have.store.transaction() as tx:
        endpoints = {item.id: item for item in tx.endpoints()}
        backlog = tx.webhook_backlog(now - GIVEN_UP)
    late = [
        item
        for item in backlog
        if item.status is not OutgoingStatus.WAITING or now - item.oldest > WAITING
    ]
    if late:
        said = ", ".join(
            f"{item.rows} {item.status.value} at {_endpoint(item.endpoint, endpoints)} "
            f"for {_span(now - item.oldest)}"
            for item in late[:3]
        )
        return _warning(f"webhooks do not arrive: {said}", "`stoker webhooks ls` and `test`")
    return f"{count_words(len(endpoints), 'endpoint')}, nothing waits"


def _endpoint(name: str, known: Mapping[str, Endpoint]) -> str:
    """Its id and host: the path of a customer's URL may be a secret."""
    host = urlsplit(known[name].url).hostname if name in known else ""
    return f"{name} ({host})" if host else name or "a job's own address"


def _clock(have: Services) -> Seen | Fault:
    """This machine's against those that it must agree with."""
    settings = have.settings
    asked: dict[str, Callable[[], datetime | None]] = {
        "the database's": lambda: probes.database(settings.database_url.reveal()).now,
        "S3's": lambda: _date(settings.s3_endpoint or "https://s3.amazonaws.com"),
        "Vast's": lambda: _date(settings.vast_url),
    }
    off: dict[str, float] = {}
    for whose, ask in asked.items():
        with contextlib.suppress(StokerError, ValueError, requests.RequestException):
            seconds = probes.ahead(have.clock, ask)
            if seconds is not None:
                off[whose] = seconds
    if not off:
        return _warning("nobody could be asked for the time", "mend the other parts first")
    whose, most = max(off.items(), key=lambda pair: abs(pair[1]))
    if abs(most) <= SKEW_S:
        return f"agrees with {_listed(list(off))}"
    way = "ahead of" if most > 0 else "behind"
    words = f"this machine's is {_span(timedelta(seconds=abs(most)))} {way} {whose}"
    alone = len(off) > 1 and sum(abs(value) > SKEW_S for value in off.values()) == 1
    where = f"{whose} machine" if alone else "this machine"
    mend = f"let NTP set the clock of {where} (`timedatectl set-ntp true`)"
    return (words, mend, Severity.CRITICAL if abs(most) > WRONG_S else Severity.WARNING)


def _date(url: str) -> datetime | None:
    return probes.date_of(probes.ask("HEAD", f"{url}/"))


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _agent(have: Services) -> Seen | Fault:
    """The agent that rented machines fetch, and the image that they run."""
    ours = have.bundle
    answer = probes.ask("GET", f"{have.settings.public_url}/agent/v1/gpu_agent.pyz")
    if hashlib.sha256(answer.content).hexdigest() != ours.sha256:
        words = "the web process hands out another agent, which new machines refuse"
        return _fault(words, "run `stoker serve` and `stoker worker` of the same version")
    image = have.settings.agent_image
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        words = f"{image} may be another image tomorrow"
        return _warning(words, "name a tag or a digest in STOKER_AGENT_IMAGE")
    return f"{len(ours.bytes) // 1000} kB, on {image}"


def _disk(have: Services) -> Seen | Fault:
    folder = have.settings.data_dir
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return _warning(f"{there} cannot be written to", "set STOKER_DATA to a directory of yours")
    free = shutil.disk_usage(there).free
    if free < LITTLE_SPACE:
        words = f"{free / 1e9:.1f} GB are free at {there}"
        severity = Severity.CRITICAL if free < NO_SPACE else Severity.WARNING
        return words, "free some space, or set STOKER_DATA to another disk", severity
    return f"{free / 1e9:.0f} GB are free at {there}"


def _standing(have: Services) -> list[Finding]:
    """Alarms that no part above tells of."""
    settings = have.settings
    try:
        with have.store.transaction() as tx:
            now = have.clock()
            red = alarms.standing(tx, settings.limits, now, kill_switch=settings.kill_switch)
    except (StokerError, SettingsError, ValueError):
        return []  # a part said why
    return [
        Finding(part=item.code, fault=item.message, mend=item.mend, severity=item.severity)
        for item in red
        if item.code not in SAID
    ]


#: What is asked at once, and what only a database that is well can tell.
FIRST: Mapping[str, Check] = {
    "database": _database,
    "schema": _schema,
    "redis": _redis,
    "vast": _vast,
    "s3": _s3,
    "cors": _cors,
    "public": _public,
    "receiver": _receiver,
    "agent": _agent,
    "clock": _clock,
    "disk": _disk,
}
BEHIND_DATABASE: Mapping[str, Check] = {
    "secrets": _secrets,
    "worker": _heard("worker", "worker", "start `stoker worker`; its log says why it ended"),
    "beat": _heard("beat", "reconcile", "start `stoker beat`"),
    "sweep": _heard("sweep", "sweep", "see the worker's log; instances may run unseen"),
    "webhooks": _webhooks,
}
#: What cannot be told of a part while another is not well.
BEHIND: Mapping[str, tuple[str, ...]] = {
    "schema": ("database",),
    "secrets": ("database", "schema"),
    "worker": ("database", "schema", "secrets"),
    "beat": ("database", "schema", "secrets", "worker"),
    "sweep": ("database", "schema", "secrets", "worker", "beat", "vast"),
    "webhooks": ("database", "schema", "secrets"),
    "cors": ("s3",),
    "receiver": ("public",),
    "agent": ("public",),
}
#: As they are told.
ORDER = (
    "database", "schema", "secrets", "redis", "worker", "beat", "sweep", "vast", "s3", "cors",
    "public", "receiver", "agent", "webhooks", "clock", "disk",
)  # fmt: skip
#: What mends a part that does not answer at all.
LATE: Mapping[str, str] = {
    "database": "start PostgreSQL, or correct DATABASE_URL",
    "redis": "start Redis, or correct REDIS_URL",
    "vast": "check VAST_URL, and the way from here to it",
    "s3": "start the store, or correct S3_ENDPOINT",
    "public": "set STOKER_PUBLIC_URL to what rented machines can reach",
    "secrets": "check STOKER_SECRET_KEYS",
}
