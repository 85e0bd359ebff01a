"""A job, checked: everything about it that can be known before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_agent.lora import data
from gpu_agent.lora.errors import JobError
from gpu_agent.lora.families import Family, family
from gpu_agent.lora.job import Job


@dataclass(frozen=True)
class Plan:
    """What will be trained on what.

    Attributes:
        base_digest: tells base models apart.
        regularization: images of the subject's class.
        warnings: what the customer should know of.
    """

    job: Job
    family: Family
    base_digest: str
    split: data.Split
    regularization: tuple[data.Picture, ...]
    warnings: tuple[str, ...]


def make(job: Job) -> Plan:
    """Find what is wrong with a job while nothing heavy has started.

    Raises:
        TrainerError: the images or the base model cannot be used.
    """
    if not job.images_dir.is_dir():
        raise JobError("job.invalid", f"images_dir {job.images_dir.name} is no folder")
    chosen = family(job.base_family)
    found = data.collect(job.images_dir, job.recipe)
    return Plan(
        job=job,
        family=chosen,
        base_digest=chosen.check(job.base_file),
        split=data.split(found.pictures, job.recipe),
        regularization=found.regularization,
        warnings=found.warnings,
    )
