"""What can go wrong when servers are started on this machine."""

from __future__ import annotations

from state.errors import StokerError


class EmbeddedError(StokerError):
    """A server cannot run here. `what` is the fault in one sentence, `hint` what to do next."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}; {hint}" if hint else what)
        self.what, self.hint = what, hint
