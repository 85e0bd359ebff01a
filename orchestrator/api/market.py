"""The door to the GPU market, for what operators ask of it. Nothing is rented or destroyed here."""

from __future__ import annotations

from infra.provider import Provider
from infra.settings import SettingsError
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps


def market(deps: Deps) -> Provider:
    """The market of this installation.

    Raises:
        Refusal: 503, when it has none.
    """
    why = "this server was given no market to ask"
    try:
        if deps.market is not None:
            return deps.market()
    except SettingsError as error:
        why = str(error)
    raise Refusal(503, "market_unset", why)
