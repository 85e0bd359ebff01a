"""Whether a rented machine comes up, and whether it is what was rented.

The market says what it sees of an instance, the machine says what it is; both are strangers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from state import policy
from state.hosts import LIED
from state.job import GpuNeeds, Reason
from state.lease import Lease
from state.policy import ALWAYS, Policy
from state.record import OUTBID


class Seen(Protocol):
    """What a market shows of an instance; see `infra.provider.Instance`."""

    @property
    def phase(self) -> str: ...
    @property
    def preempted(self) -> bool: ...
    @property
    def message(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is kept on the lease, and why the machine must go; None while it may go on."""

    note: str
    noted_at: datetime
    reason: Reason | None = None


#: What a registry says of an image that no machine will ever get.
_NO_IMAGE = re.compile(
    r"manifest\b.*\b(not found|unknown)|pull access denied|repository does not exist"
    r"|unauthorized: authentication required|invalid reference format",
    re.IGNORECASE,
)
_RETRYING = re.compile(r"retrying in", re.IGNORECASE)
_NUMBERS = re.compile(r"\d+(\.\d+)?")


def verdict(
    lease: Lease,
    seen: Seen,
    now: datetime,
    rules: Policy = policy.DEFAULT,
    *,
    since: datetime = ALWAYS,
) -> Verdict:
    """What to make of a rented machine that the market shows.

    `since` is how long an agent could have been heard: a machine that found our door closed is
    not stuck.
    """
    retrying = bool(_RETRYING.search(_said(seen)))
    said = _NUMBERS.sub("…", _said(seen)) if retrying else _said(seen)
    note = f"{seen.phase}: {said}"[:500]
    noted_at = lease.noted_at if lease.noted_at and lease.note == note else now
    reason = None
    if seen.phase == "ended":
        reason = ended(lease, seen)
    elif lease.ready_at is None:
        stood = now - max(noted_at, since)
        reason = _no_image(seen) or _stuck(lease, seen, retrying, stood, rules)
    return Verdict(note=note, noted_at=noted_at, reason=reason)


def _said(seen: Seen) -> str:
    """The market's words as every database can keep them."""
    return "".join(char if char.isprintable() else " " for char in seen.message).strip()[:500]


def ended(lease: Lease, seen: Seen) -> Reason:
    """Why a machine will not run (again)."""
    ready = lease.ready_at is not None
    if not ready and (reason := _no_image(seen)):
        return reason
    if seen.preempted and lease.bid:
        return Reason(code=OUTBID, message=_said(seen) or "somebody bid more for the machine")
    if ready:
        return Reason(code="host.ended", message=_said(seen) or "the instance ended")
    what = "lost its GPU before it ran" if seen.preempted else "was given up before it ran"
    return _boot(f"the instance {what}", seen)


def _no_image(seen: Seen) -> Reason | None:
    if not _NO_IMAGE.search(_said(seen)):
        return None
    # No machine's fault, and no other machine would fare better.
    return Reason(code="image.unavailable", message=_said(seen), retryable=False)


def _stuck(
    lease: Lease, seen: Seen, retrying: bool, stood: timedelta, rules: Policy
) -> Reason | None:
    limit, what = _patience(seen.phase, retrying, rules)
    if stood < limit:
        return None
    since = f"{what}, for {policy.words(stood)}"
    if seen.phase == "lost":
        return Reason(code="host.lost", message=since)
    return _boot(since, seen)


def _patience(phase: str, retrying: bool, rules: Policy) -> tuple[timedelta, str]:
    """How long a boot may stand still, and what it is then."""
    if phase == "lost":
        return rules.lost, "the market has lost sight of the host"
    if retrying:
        return rules.boot_retrying, "the download of the image is tried again and again"
    if phase == "running":
        return rules.boot_stuck, "the instance runs, and its agent was never heard"
    return rules.boot_stuck, "the boot is stuck"


def stuck_from(
    lease: Lease, rules: Policy = policy.DEFAULT, since: datetime = ALWAYS
) -> datetime | None:
    """When a booting machine counts as stuck, if the market says nothing else of it until then;
    None while it said nothing, or when its agent was heard."""
    if lease.noted_at is None or lease.ready_at is not None:
        return None
    phase, _, said = lease.note.partition(": ")
    limit, _ = _patience(phase, bool(_RETRYING.search(said)), rules)
    return max(lease.noted_at, since) + limit


def _boot(what: str, seen: Seen) -> Reason:
    return Reason(code="host.boot", message=f"{what}: {_said(seen)}" if _said(seen) else what)


# --- what the machine says of itself ----------------------------------------------------------

#: A machine may have so much less than its offer says before that counts as a lie: drivers keep
#: a part of the memory for themselves, and what was installed already lies on the disk.
LEAST_VRAM, LEAST_DISK = 0.9, 0.5
_MODEL = re.compile(r"[a-z]*\d{2,}")
_FORM = re.compile(r"sxm\d*|pcie|nvl|hbm\d\w*|\d+gb")
#: Of two GPUs that share a number these are others.
_KINDS = ("ti", "super", "ada")


def lie(lease: Lease, needs: GpuNeeds, machine: Mapping[str, Any]) -> Reason | None:
    """What of its offer a machine does not keep, by what its agent found on it; None when it
    keeps all of it, as far as the agent could see: what was not found out is no lie."""
    names = ("gpus", "gpu_name", "vram_mb", "disk_free_gb", "cuda")
    gpus, name, vram_mb, disk, cuda = (machine.get(item) for item in names)
    lies: list[str] = []
    if gpus == 0:
        lies.append("it has no GPU that answers")
    if name and lease.gpu_name and not same_gpu(lease.gpu_name, name):
        lies.append(f"its GPU is a {name} and no {lease.gpu_name}")
    if vram_mb is not None and vram_mb / 1000 < lease.vram_gb * LEAST_VRAM:
        lies.append(f"its GPU has {vram_mb / 1000:.1f} GB and not {lease.vram_gb:g}")
    if disk is not None and disk < lease.disk_gb * LEAST_DISK:
        lies.append(f"{disk:.1f} GB of disk are free and not {lease.disk_gb:g}")
    if cuda is not None and cuda < needs.min_cuda:
        driver = f" (driver {machine['driver']})" if machine.get("driver") else ""
        lies.append(f"its driver serves CUDA {cuda:g}{driver} and not {needs.min_cuda:g}")
    if not lies:
        return None
    return Reason(code=LIED, message=f"machine {lease.machine_id}: {'; '.join(lies)}")


def same_gpu(offered: str, found: str) -> bool:
    """Whether what the driver calls a GPU can be what the market calls it.

    `A100 SXM4` is `NVIDIA A100-SXM4-80GB`, `RTX 6000Ada` is `NVIDIA RTX 6000 Ada Generation`. In
    doubt they are the same: to call an honest host a liar costs more than one slow attempt.
    """
    wanted, there = (_FORM.sub(" ", text.lower()) for text in (offered, found))
    model = _MODEL.search(wanted)
    if model is None:
        return True
    packed = re.sub(r"[^a-z0-9]", "", there)
    if re.search(rf"(?<![0-9]){model[0]}(?![0-9])", packed) is None:
        return False
    return all(_is(kind, there) for kind in _KINDS if _is(kind, wanted))


def _is(kind: str, name: str) -> bool:
    return re.search(rf"(\d|\b){kind}\b", name) is not None
