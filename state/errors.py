"""What can go wrong, as a tree; the type says whose fault it is and whether to try again.

StokerError
├── IllegalMove          an event that the machine refuses; nothing happened
├── NotFound             no such job, dataset, lease …
├── Conflict             it exists already, or its state forbids what was asked
├── TokenRefused         a bootstrap token that is unknown, expired or used
├── AttemptOver          this machine's attempt is over, or another machine has it
├── ProviderError        a GPU market (or our way to it)
│   ├── Refused          a clear no: nothing was rented or changed (`code`, `machine_id`)
│   │   ├── OfferGone    somebody else took this offer; the next one may do
│   │   ├── Throttled    too many requests; nothing happened, ask again after `retry_after`
│   │   └── AccountFault no credit, wrong key, spend limit: no offer will do; tell the operator
│   ├── Unknown          no answer, or none that can be trusted: it may have happened
│   └── Unreadable       a list or record that could not be read: it says nothing, least of all
│                        "nothing there"
├── StorageError         the object store could not be asked, or holds something else
├── StoreUnavailable     the database cannot be asked now; asking again may help
└── SecretUnreadable     a secret at rest fits none of the keys we were given
"""

from __future__ import annotations


class StokerError(Exception):
    """Base of everything that Stoker raises on purpose."""


class IllegalMove(StokerError):
    """The machine refuses `event` in `status`; nothing happened."""

    def __init__(self, subject: str, event: str, status: str) -> None:
        self.subject, self.event, self.status = subject, event, status
        super().__init__(f"{subject} is {status}: {event} is not possible now")


class NotFound(StokerError):
    """There is no such thing (or not for this caller)."""


class Conflict(StokerError):
    """It exists already, or its present state forbids what was asked."""


class TokenRefused(StokerError):
    """A bootstrap token that is unknown, expired, used or revoked."""

    def __init__(self) -> None:
        super().__init__("this token is unknown, expired or used")


class AttemptOver(StokerError):
    """The attempt of a machine is over, or another machine has it: it must stop."""

    def __init__(self) -> None:
        super().__init__("this attempt is over: stop, and give the machine back")


class ProviderError(StokerError):
    """A GPU market said no, or could not be understood.

    `instance_id` is set whenever the answer named one: that instance may be billing.
    """

    def __init__(self, message: str, *, code: str = "", instance_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.instance_id = code, instance_id


class Refused(ProviderError):
    """A clear no. Nothing was rented or changed."""


class OfferGone(Refused):
    """This offer can no longer be rented; another may."""


class Throttled(Refused):
    """Too many requests; nothing happened."""

    def __init__(self, message: str, *, retry_after: float = 10.0) -> None:
        super().__init__(message, code="throttled")
        self.retry_after = retry_after


class AccountFault(Refused):
    """No credit, wrong key or a spend limit: an operator must act."""


class Unknown(ProviderError):
    """No trustworthy answer: what was asked may have happened."""


class Unreadable(ProviderError):
    """A list or record could not be read. It must never be taken for an empty one."""


class StorageError(StokerError):
    """The object store could not be asked, or holds something else than expected.

    `code` is for programs; `retryable` is false when asking again cannot help.
    """

    def __init__(self, message: str, *, code: str = "storage", retryable: bool = True) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable


class StoreUnavailable(StokerError):
    """The database cannot be asked now, or it broke off: the transaction must be run again.

    A connection lost during the commit itself leaves open whether it happened, so whoever runs
    it again must be safe to run twice.
    """


class SecretUnreadable(StokerError):
    """A secret at rest was sealed with a key that we were not given, or was altered."""
