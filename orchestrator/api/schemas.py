"""What crosses the public interface, in both directions. Unknown fields are refused."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from state.alarms import Severity
from state.events import DatasetStatus, OutgoingStatus
from state.job import Status
from state.lease import LeaseStatus


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    return text


Text = Annotated[str, AfterValidator(_storable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="lower-case hex")]
MicroUsd = Annotated[int, Field(description="micro-USD")]
#: One PUT of S3 holds at most this.
MAX_UPLOAD = 5 * 10**9


class In(BaseModel):
    """Base of what is sent to us."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Out(BaseModel):
    """Base of what we answer."""

    model_config = ConfigDict(extra="forbid")


# --- datasets ---------------------------------------------------------------------------------


def _file_name(text: str) -> str:
    plain = text.removeprefix("regularization/")
    if plain in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", plain):
        raise ValueError(
            "must be a plain file name, without control characters and without folders other "
            "than regularization/"
        )
    return text


class FileIn(In):
    """A photograph; beside one its caption (`name.txt`) or mask (`name.mask.png`); in
    `regularization/` a photograph of its subject's class; or captions as `metadata.jsonl`."""

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_file_name)]
    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD)]
    sha256: Sha256


class ZipIn(In):
    """One zip of photographs and captions."""

    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD)]
    sha256: Sha256


class DatasetIn(In):
    """Either `files` or `zip`."""

    files: Annotated[list[FileIn], Field(min_length=1, max_length=10_000)] | None = None
    zip: ZipIn | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.files is None) == (self.zip is None):
            raise ValueError("send either files or zip")
        names = [item.name.casefold() for item in self.files or ()]
        if len(set(names)) != len(names):
            raise ValueError("two files have the same name")
        return self


class UploadsIn(In):
    """Whose upload URLs to renew; all when `names` is left out."""

    names: Annotated[list[Text], Field(max_length=10_000)] | None = None


class Upload(Out):
    """One PUT to make, with exactly these headers."""

    name: str
    url: str
    headers: dict[str, str]
    expires_at: datetime


class FileOut(Out):
    name: str
    bytes: int
    sha256: str


class Dataset(Out):
    id: str
    status: DatasetStatus
    created_at: datetime
    files: list[FileOut]
    report: dict[str, Any] = Field(description="kept, warned and refused images, with reasons")
    zip: FileOut | None = Field(description="what training gets, once it is built")


class NewDataset(Dataset):
    uploads: list[Upload]


class Uploads(Out):
    data: list[Upload]


class DatasetPath(BaseModel):
    dataset_id: str


# --- jobs -------------------------------------------------------------------------------------


class GpuIn(In):
    """What the machine must have."""

    min_vram_gb: Annotated[
        float,
        Field(
            ge=1,
            le=1000,
            description="raised to what the recipe takes; the job's `gpu` says what was chosen",
        ),
    ] = 8.0
    gpu_names: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._-]{1,40}$")]], Field(max_length=20)
    ] = []
    disk_gb: Annotated[
        float, Field(ge=10, le=2000, description="raised to what the base model takes")
    ] = 40.0
    max_price: Annotated[
        int, Field(ge=1, le=100_000_000, description="micro-USD per hour, whole machine")
    ] = 2_000_000
    min_reliability: Annotated[float, Field(ge=0, le=1)] = 0.9
    min_download_mbps: Annotated[float, Field(ge=0, le=100_000)] = 100.0
    verified_only: bool = True
    min_cuda: Annotated[float, Field(ge=0, le=100)] = 12.4


WebhookSecret = Annotated[str, Field(max_length=128, pattern=r"^whsec_[A-Za-z0-9+/]+={0,2}$")]


class WebhookIn(In):
    """Where this job's transitions are told. A secret is made when none is given."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    secret: WebhookSecret | None = Field(default=None, repr=False)


Family = Literal["sd1", "sd2", "sdxl", "sd3", "flux", "lumina2", "hunyuanimage", "anima"]
MetadataKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]
MetadataValue = Annotated[str, Field(max_length=500), AfterValidator(_storable)]


class RehearsalIn(In):
    """What a test key rehearses."""

    fixture: Literal[
        "test_success",
        "test_oom",
        "test_host_dies",
        "test_no_offers",
        "test_slow_boot",
        "test_bad_weights",
        "test_fails",
    ] = "test_success"
    time_scale: Annotated[
        float, Field(ge=1, le=600, description="seconds of it that pass in one real second")
    ] = 60.0


class TrainingIn(In):
    """What an order says of a training, whatever its photographs."""

    base: Annotated[
        str,
        Field(
            max_length=1024,
            description="`civitai:<version>`, `hf:<owner>/<repo>[/<file>]`, `s3:bases/<key>`, URL",
        ),
    ]
    method: Literal["lora"] = "lora"
    base_family: Family = "sd1"
    recipe: dict[str, Any] = Field(default={}, description="how to train; see the docs")
    gpu: GpuIn = GpuIn()
    max_cost: Annotated[
        int, Field(ge=1, le=10_000_000_000, description="micro-USD, all attempts together")
    ] = 5_000_000
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    interruptible: bool = Field(
        default=False,
        description="take cheaper machines by bid; outbid, it goes on elsewhere from its last "
        "checkpoint, which is no attempt, and after the second time on demand",
    )
    hedge: bool = Field(
        default=True,
        description="rent a second machine when the first is slow to boot; the job gets the one "
        "that is ready first, and pays for both",
    )
    test: RehearsalIn | None = Field(
        default=None,
        description="with a test key (`stk_test_…`) only: which part the machines play, and how "
        "fast; nothing real is rented or spent",
    )
    webhook: WebhookIn | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}


class JobIn(TrainingIn):
    dataset_id: Annotated[str, Field(max_length=64)]


class DryRunQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(
        default=False, description="answer what it would cost and take; order and spend nothing"
    )


class JobHeader(BaseModel):
    idempotency_key: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")] | None = Field(
        default=None,
        alias="Idempotency-Key",
        description="the same key and body answer the same job again, for at least 24 h",
    )


class JobPath(BaseModel):
    job_id: str


class ArtefactPath(BaseModel):
    job_id: str
    name: str


class JobsQuery(BaseModel):
    """`metadata[key]=value` may be given too, several times with other keys."""

    model_config = ConfigDict(extra="allow")

    status: list[Status] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="`next_cursor` of the page before",
    )

    @model_validator(mode="after")
    def _only_metadata_besides(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if not re.fullmatch(r"metadata\[[A-Za-z0-9_.-]{1,40}\]", key):
                raise ValueError(f"unknown parameter {key[:100]!r}")
            _storable(str(value))
        return self

    def metadata(self) -> dict[str, str]:
        return {
            key.removeprefix("metadata[").removesuffix("]"): str(value)
            for key, value in (self.model_extra or {}).items()
        }


class WaitQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    wait: Annotated[int, Field(ge=0, le=30)] = Field(
        default=0, description="seconds to wait for a change before answering"
    )


class EventsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: Annotated[int, Field(ge=0, lt=2**53)] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class Reason(Out):
    code: str
    message: str
    retryable: bool


class Transition(Out):
    seq: int
    at: datetime
    attempt: int
    source: Status
    target: Status
    cause: str
    reason: Reason | None


class Host(Out):
    machine_id: str
    gpu: str
    geo: str


class LeaseCost(Out):
    """What one machine cost, by our own count; `billed` is what the market charged so far."""

    attempt: int
    machine_id: str
    gpu: MicroUsd
    disk: MicroUsd
    bandwidth: MicroUsd
    billed: MicroUsd | None = Field(description="once the market said so")
    counts: MicroUsd = Field(description="what so_far takes of it")
    by: Literal["count", "market"] = Field(description="whose figure `counts` is")


class Cost(Out):
    # what was added later has a default: answers that are kept for a key lack it
    quoted: MicroUsd | None = Field(
        default=None,
        description="what the whole job was expected to cost when its machine was rented",
    )
    quoted_display: str | None = None
    quoted_per_hour: MicroUsd | None = Field(description="of the present machine")
    so_far: MicroUsd
    cap: MicroUsd
    currency: Literal["USD"] = "USD"
    display: str = Field(description="so_far, for people")
    cap_display: str = ""
    machines: list[LeaseCost] = Field(description="the receipt, machine by machine")


class ResultFile(Out):
    name: str
    bytes: int
    sha256: str
    attempt: int
    verified: bool
    expired: bool
    created_at: datetime
    url: str = Field(description="redirects to a short-lived download")


class Rehearsal(Out):
    """What is rehearsed, and how many of its seconds pass in one real second."""

    fixture: str
    time_scale: float


class JobSummary(Out):
    """A job as a line of a list."""

    id: str
    livemode: bool = Field(default=True, description="false for what a test key ordered")
    test: Rehearsal | None = Field(default=None, description="what it rehearses, if it does")
    status: Status
    stalled_from: Status | None
    reason: Reason | None
    retry_at: datetime | None
    attempt: int
    dataset_id: str
    base: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    entered_at: datetime = Field(description="when the present status began")
    deadline_at: datetime | None = Field(description="when the present status must be left")
    moved_at: datetime | None = Field(description="when its work last went forward")
    progress: dict[str, Any] = Field(
        description="step, total, loss, eta_s, bytes and bytes_total as they are now, where they "
        "are known; and the latest of each kind of report"
    )
    host: Host | None
    cost: Cost
    metadata: dict[str, str]


class Job(JobSummary):
    method: str
    base_family: str
    recipe: dict[str, Any]
    gpu: dict[str, Any] = Field(description="what machines are looked for, in effect")
    max_attempts: int
    interruptible: bool
    interruptions: int = Field(description="attempts lost to higher bids; they are no tries")
    hedge: bool
    webhook_url: str | None
    transitions: list[Transition]
    result_files: list[ResultFile]


class NewJob(Job):
    webhook_secret: str | None = Field(description="shown in this answer only")


class Jobs(Out):
    data: list[JobSummary]
    has_more: bool
    next_cursor: str | None


class Event(Out):
    seq: int
    type: str
    attempt: int
    at: datetime
    data: dict[str, Any]


class Events(Out):
    data: list[Event]
    has_more: bool
    next_after: int


class Artefacts(Out):
    data: list[ResultFile]


class Lease(Out):
    status: LeaseStatus
    machine_id: str
    gpu: str
    geo: str
    price_per_hour: MicroUsd
    created_at: datetime
    rented_at: datetime | None
    ready_at: datetime | None
    released_at: datetime | None
    expires_at: datetime
    cost: MicroUsd
    why: str


class Alarm(Out):
    """Something that needs an operator."""

    code: str
    severity: Severity
    message: str
    since: datetime
    mend: str


class Alarms(Out):
    alarms: list[Alarm]


class Attempt(Out):
    number: int
    created_at: datetime
    hello_at: datetime | None
    leases: list[Lease]


class Attempts(Out):
    data: list[Attempt]


class Try(Out):
    tried_at: datetime
    answer: int = Field(description="HTTP status, 0 when there was none")
    took_ms: int
    error: str


class Delivery(Out):
    """One webhook owed to one place."""

    id: str = Field(description="the webhook-id")
    job: str | None = Field(description="null: a test of the endpoint")
    endpoint: str | None = Field(description="null: the job's own webhook")
    seq: int
    type: str
    status: OutgoingStatus
    created_at: datetime
    due_at: datetime | None
    ended_at: datetime | None = Field(description="when it was delivered, given up or disabled")
    tries: list[Try]


class Deliveries(Out):
    data: list[Delivery]
