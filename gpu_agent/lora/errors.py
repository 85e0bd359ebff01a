"""Every way in which a training can end badly, as the customer will read it.

::

    TrainerError                 code                 retryable
    ├── JobError                 job.invalid          no
    │   └── (recipe)             recipe.invalid       no
    ├── DatasetError             dataset.*            no
    ├── ModelError               model.*              only where a second download may help
    └── TrainingError            training.*, trainer.*  says so itself
"""

from __future__ import annotations


class TrainerError(Exception):
    """The training cannot go on. `code` is stable, the text says what to do next."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class JobError(TrainerError):
    """job.json or the recipe in it cannot be understood."""


class DatasetError(TrainerError):
    """The images or captions cannot be trained on."""


class ModelError(TrainerError):
    """The base model cannot be read."""


class TrainingError(TrainerError):
    """The training itself failed: it diverged, or the machine could not carry it."""
