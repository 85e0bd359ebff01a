"""The job: what a customer asked for, and how far it has come. Frozen values."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from state.rehearsal import Rehearsal
from state.value import Value


class Status(enum.StrEnum):
    """The customer's words; public API, never spelled otherwise."""

    #: Images are still arriving, or the zip is being checked and built.
    PENDING = "pending"
    #: A GPU is being rented, is booting or installing.
    PENDING_GPU = "pendingGpu"
    #: The agent downloads and unpacks the zip.
    PENDING_IMAGES = "pendingImages"
    #: The agent downloads the base model and puts everything in place.
    PENDING_MODEL = "pendingModel"
    #: Training, then uploading.
    TRAINING = "training"
    #: The verified weights can be downloaded.
    COMPLETED = "completed"
    #: No progress within the state's deadline, or an error; a retry or the end follows.
    STALLED = "stalled"
    #: Tries, time or money used up, or the reason cannot be retried.
    FAILED = "failed"
    #: The customer or an operator said so.
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
#: An attempt is open, and its agent's facts count, exactly in these.
ACTIVE = frozenset(
    {Status.PENDING_GPU, Status.PENDING_IMAGES, Status.PENDING_MODEL, Status.TRAINING}
)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a job stalled or failed. `code` is for programs, `message` for people."""

    code: str
    message: str
    retryable: bool = True

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class GpuNeeds:
    """What an offer must have. `max_price` is micro-USD per hour for the whole machine."""

    min_vram_gb: float = 8.0
    gpu_names: tuple[str, ...] = ()
    disk_gb: float = 40.0
    max_price: int = 2_000_000
    min_reliability: float = 0.9
    min_download_mbps: float = 100.0
    verified_only: bool = True
    min_cuda: float = 12.4


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What the customer asked for; never changes.

    `base` is `civitai:<version>`, `hf:<repo>[/<file>]`, `s3:<key>` or an https URL.
    `max_cost` is micro-USD for the whole job, all attempts together.
    `interruptible` takes cheaper machines that somebody else may outbid; the training then goes
    on elsewhere from its last checkpoint. `hedge` rents a second machine when the first is slow
    to boot; the one that is ready first gets the job. `rehearsal` is set for what a test key
    ordered: it runs on machines that only pretend, and costs nothing.
    """

    dataset_id: str
    base: str
    method: str = "lora"
    base_family: str = "sd1"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    gpu: GpuNeeds = GpuNeeds()
    max_cost: int = 5_000_000
    max_attempts: int = 3
    interruptible: bool = False
    hedge: bool = True
    webhook_url: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    rehearsal: Rehearsal | None = None


@dataclass(frozen=True, kw_only=True)
class Job(Value):
    """One customer's training.

    Attributes:
        attempt: number of the current try, from 1; the fence: facts of another one do nothing.
        known: milestone facts known of the current attempt (their `Fact` values).
        seq: number of this job's latest event; events count from 1 without gaps.
        owed: how many webhooks the customer was promised; their `seq` counts without gaps.
        dataset_ready: the zip is built and checked.
        entered_at: when the present status began.
        deadline_at: when the present status must have been left.
        lease: id of the lease whose agent has the current attempt; empty until one said hello.
        last_heard_at: when the current attempt's agent was last heard (server clock).
        moved: the agent's count of whatever it got done in this attempt; it only grows.
        moved_at: when `moved` last grew, or the present status began.
        interruptions: how many attempts were lost to higher bids, or because the account had no
            credit; they are not held against it.
        due_at: when somebody must look at this job again; None when there is nothing to do.
        orders: waiting for the agent's next report.
        progress: latest of step, total, loss, eta_s, bytes … by kind.
        excluded_machines: where an attempt failed; never rented again for this job.
    """

    id: str
    owner: str
    request: JobRequest
    created_at: datetime
    entered_at: datetime
    status: Status = Status.PENDING
    attempt: int = 1
    known: frozenset[str] = frozenset()
    seq: int = 0
    owed: int = 0
    dataset_ready: bool = False
    stalled_from: Status | None = None
    reason: Reason | None = None
    retry_at: datetime | None = None
    deadline_at: datetime | None = None
    lease: str = ""
    last_heard_at: datetime | None = None
    moved: int = 0
    moved_at: datetime | None = None
    interruptions: int = 0
    due_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    orders: tuple[str, ...] = ()
    progress: Mapping[str, Any] = field(default_factory=dict)
    excluded_machines: tuple[str, ...] = ()

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def active(self) -> bool:
        """Whether the current attempt is open."""
        return self.status in ACTIVE


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of the machine, as recorded and relayed."""

    job: str
    attempt: int
    source: Status
    target: Status
    #: The event that caused it, e.g. `gpu.ready`, `stall`, `cancel`.
    cause: str
    at: datetime
    reason: Reason | None = None
