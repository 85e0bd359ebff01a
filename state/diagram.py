"""The machine as a page: drawn from `machine.TABLE`, never by hand."""

from __future__ import annotations

from state.job import TERMINAL, Status
from state.machine import ADVANCE, TABLE, Row

MEANINGS: dict[Status, str] = {
    Status.PENDING: "images are still arriving, or the zip is being checked and built",
    Status.PENDING_GPU: "a GPU is being rented, is booting or installing",
    Status.PENDING_IMAGES: "the agent downloads and unpacks the zip",
    Status.PENDING_MODEL: "the agent downloads the base model and puts everything in place",
    Status.TRAINING: "training, then uploading",
    Status.COMPLETED: "the verified weights can be downloaded",
    Status.STALLED: "no progress within the deadline of the state, or an error",
    Status.FAILED: "tries, time or money used up, or the reason cannot be retried",
    Status.CANCELLED: "the customer or an operator said so",
}


def _label(row: Row) -> str:
    return " + ".join(row.needs) if row.trigger == ADVANCE else row.trigger


def markdown() -> str:
    """The whole of `docs/states.md`."""
    lines = [
        "# The states of a job",
        "",
        "Generated from `state/machine.py` by `stoker diagram`; a test holds them together.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        f"    [*] --> {Status.PENDING}",
        *(f"    {row.source} --> {row.target}: {_label(row)}" for row in TABLE),
        *(f"    {status} --> [*]" for status in Status if status in TERMINAL),
        "```",
        "",
        "| status | means | left by |",
        "|---|---|---|",
    ]
    for status in Status:
        rows = [f"{_label(row)} → `{row.target}`" for row in TABLE if row.source is status]
        lines.append(f"| `{status}` | {MEANINGS[status]} | {'; '.join(rows) or 'terminal'} |")
    return "\n".join(lines) + "\n"
