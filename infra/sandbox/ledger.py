"""The account's money: every charge by contract, kind and minute, and the credit that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infra.sandbox.contracts import Contract, MarketError
from infra.sandbox.query import read_token, token

BUCKET_S = 60
MAX_LIMIT = 500
KINDS = ("gpu", "disk", "bwd", "bwu")


class Ledger:
    """US dollars. Credit falls with each charge, and may fall below nothing.

    Args:
        lag_s: market seconds by which what `page` shows is behind what was charged.
    """

    def __init__(self, credit: float, *, lag_s: float = 0.0) -> None:
        self.credit, self.lag_s = credit, lag_s
        self.total = 0.0
        #: contract id → (minute of the market, kind) → dollars
        self._entries: dict[int, dict[tuple[int, str], float]] = {}

    def charge(self, contract: Contract, at: float, items: Mapping[str, float]) -> None:
        """Book `items` (kind → dollars) at a market time."""
        entries = self._entries.setdefault(contract.id, {})
        for kind, dollars in items.items():
            key = (int(at // BUCKET_S), kind)
            entries[key] = entries.get(key, 0.0) + dollars
            contract.charges[kind] += dollars
            self.total += dollars
            self.credit -= dollars

    def accrue(
        self, contract: Contract, since: float, until: float, per_hour: Mapping[str, float]
    ) -> None:
        """Book what runs by the hour (kind → dollars) between two market times."""
        while since < until:
            end = min(until, (since // BUCKET_S + 1) * BUCKET_S)
            hours = (end - since) / 3600
            items = {kind: hours * dollars for kind, dollars in per_hour.items()}
            self.charge(contract, since, items)
            since = end

    def page(
        self,
        contracts: Sequence[Contract],
        *,
        now: float,
        began: float,
        time_scale: float,
        filters: Mapping[str, Any],
        limit: int,
        after: str | None,
    ) -> dict[str, Any]:
        """Charges as the REST shows them, one result per contract, within the `day` of `filters`
        (epoch seconds). Raises: MarketError (400)."""
        for column in filters:
            if column not in ("day", "type"):
                msg = f"Error in query parameters: {column} is not a valid search key"
                raise MarketError(400, "invalid_request", msg)
        day = filters.get("day") or {}
        first, last = day.get("gte", 0.0), day.get("lte", math.inf)
        settled = now - self.lag_s if self.lag_s else math.inf
        kinds = (filters.get("type") or {}).get("in", ["instance"])
        results = []
        for contract in contracts if "instance" in kinds else ():
            items = dict.fromkeys(KINDS, 0.0)
            times = []
            for (minute, kind), dollars in self._entries.get(contract.id, {}).items():
                at = minute * BUCKET_S
                date = max(began + at / time_scale, contract.start_date)
                if at + BUCKET_S <= settled and first <= date <= last:
                    items[kind] += dollars
                    times.append(date)
            if times:
                results.append(_result(contract, items, min(times), max(times)))
        try:
            rows = [{"id": result["source"]} for result in results]
            start = read_token(after, rows) if after else 0
        except ValueError as error:
            raise MarketError(400, "invalid_token", str(error)) from None
        shown = results[start : start + min(max(limit, 1), MAX_LIMIT)]
        more = start + len(shown) < len(results)
        return {
            "success": True,
            "count": len(shown),
            "total": len(results),
            "next_token": token(start + len(shown), shown[-1]["source"]) if more else None,
            "results": shown,
        }


def _result(
    contract: Contract, items: Mapping[str, float], start: float, end: float
) -> dict[str, Any]:
    return {
        "start": start,
        "end": end,
        "type": "instance",
        "source": f"instance-{contract.id}",
        "amount": sum(items.values()),
        "metadata": {"label": contract.label},
        "items": [{"type": kind, "amount": dollars} for kind, dollars in items.items()],
    }
