"""The sandbox's market: hosts and their offers, renting one, and what the account may read."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from infra.sandbox.contracts import Contract, MarketError, check_create, no_such_ask
from infra.sandbox.hosts import Host, seeded
from infra.sandbox.life import Life
from infra.sandbox.machines import Machines
from infra.sandbox.query import matches, number, order, read_token, sort, token

PAGE = 25
SEARCH_CAP = 64
MAX_LABEL = 1024
#: The stored columns that a list may be filtered and ordered by.
LIST_COLUMNS = frozenset(
    {"id", "label", "machine_id", "actual_status", "intended_status", "gpu_name", "verification"}
)


class Market(Life):
    """Offers, contracts and the ledger of one account.

    Args:
        hosts: what is for rent; None takes those of `seed`.
        others: see `Life`.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        hosts: Sequence[Host] | None = None,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(machines, **others)
        self._random = random.Random(seed)
        self._next_id = 20_000_000 + self._random.randrange(1_000_000)
        self.hosts = {host.machine_id: host for host in hosts or seeded(seed)}
        self._first = dict(self.hosts)
        #: One ask per free host: ask id to machine id.
        self.asks: dict[int, int] = {self._number(): machine for machine in self.hosts}

    # offers

    def search(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The offers that match a search body."""
        disk = number(query.get("allocated_storage"), 10.0)
        bid = query.get("type") in ("bid", "interruptible")
        with self.lock:
            offers = [self._offer(ask, machine, disk, bid) for ask, machine in self.asks.items()]
        filters = {key: value for key, value in query.items() if isinstance(value, Mapping)}
        found = [offer for offer in offers if matches(offer, filters)]
        sort(found, order(query.get("order")))
        limit = int(number(query.get("limit"), SEARCH_CAP))
        return found[: min(max(limit, 0), SEARCH_CAP)]

    def reprice(self, machine: int, factor: float) -> None:
        """`factor` times its first price for whoever rents it from now on; the offers shown are
        the old ones."""
        with self.lock:
            host = self._first[machine]
            self.hosts[machine] = dataclasses.replace(
                host,
                dph_base=round(host.dph_base * factor, 6),
                min_bid=round(host.min_bid * factor, 6),
            )

    def take(self, ask: int) -> None:
        """Somebody else was faster: the ask is gone, its machine comes back under another."""
        with self.lock:
            machine = self.asks.pop(ask, None)
            if machine is not None:
                self.released(machine)

    def machine_of(self, op: str, named: int | None) -> int | None:
        """The machine that a call concerns, by the ask or instance that it names."""
        with self.lock:
            if named is None:
                return None
            if op == "create":
                return self.asks.get(named)
            contract = self.contracts.get(named)
            return contract.host.machine_id if contract else None

    # contracts

    def create(self, ask: int, body: Mapping[str, Any]) -> Contract:
        """Rent `ask`. Raises: MarketError."""
        with self.lock:
            machine = self.asks.get(ask)
            if machine is None:
                raise no_such_ask(ask, 410 if body.get("cancel_unavail") else 404)
            host = self.hosts[machine]
            check_create(body, host, ask)
            if self.credit <= 0:
                raise MarketError(400, "insufficient_credit", "Your account lacks credit.")
            contract = self._contract(host, body)
            del self.asks[ask]
            if contract.is_bid and contract.gpu_price < host.min_bid:
                # A real quirk: refused, and yet there is a (stopped) contract.
                self.begin(contract)
                self.refuse(contract.id)
                raise MarketError(
                    400, "invalid_price", "Bid is too low.", new_contract=contract.id, ask_id=ask
                )
            self.begin(contract)
            self._contend(machine)
            self.released(machine)
            return contract

    def refuse(self, created: int) -> None:
        """A contract was made, and will not run."""
        with self.lock:
            contract = self.need(created)
            contract.wanted, contract.actual, contract.message = False, "created", None
            contract.halt()

    def get(self, wanted: int) -> Contract | None:
        """The contract, once reads show it."""
        with self.lock:
            contract = self.contracts.get(wanted)
            return contract if contract and self._readable(contract) else None

    def label(self, wanted: int, label: str) -> None:
        with self.lock:
            contract = self.need(wanted)
            if len(label) > MAX_LABEL:
                raise MarketError(400, "label_too_long", f"at most {MAX_LABEL} characters")
            contract.label = label

    def page(
        self, filters: Mapping[str, Any], by: Any, limit: int, after: str | None
    ) -> dict[str, Any]:
        """One page of the list. Raises: MarketError (400)."""
        columns = [column for column, _ in order(by)]
        for column in (*filters, *columns):
            if column not in LIST_COLUMNS:
                msg = f"Error in query parameters: {column} is not a valid search key"
                raise MarketError(400, "invalid_request", msg)
        with self.lock:
            shown = [item for item in self.contracts.values() if self._readable(item)]
            everything = [self.row(contract) for contract in shown]
        rows = [row for row in everything if matches(row, filters)]
        sort(rows, order(by) or [("id", "asc")])
        try:
            first = read_token(after, rows) if after else 0
        except ValueError as error:
            raise MarketError(400, "invalid_token", str(error)) from None
        page = rows[first : first + min(max(limit, 1), PAGE)]
        more = first + len(page) < len(rows)
        labels = [row["label"] or "" for row in everything]
        return {
            "success": True,
            "instances_found": len(rows),
            "total_instances": len(everything),
            "label_counts": {label: labels.count(label) for label in sorted(set(labels))},
            "next_token": token(first + len(page), page[-1]["id"]) if more else None,
            "instances": page,
        }

    def row(self, contract: Contract) -> dict[str, Any]:
        """An instance as the REST shows it."""
        with self.lock:
            return contract.row()

    def bill(
        self, filters: Mapping[str, Any] | None = None, limit: int = 500, after: str | None = None
    ) -> dict[str, Any]:
        """The charges, one result per instance. Raises: MarketError (400)."""
        with self.lock:
            return self.ledger.page(
                [*self.ended, *self.contracts.values()],
                now=self.now(),
                began=self.date(0),
                time_scale=self.time_scale,
                filters=filters or {},
                limit=limit,
                after=after,
            )

    def released(self, machine: int) -> None:
        """Offer this machine (again), where it is not offered and somebody could have it."""
        if self.rivals.get(machine) == float("inf") or machine in self.asks.values():
            return
        ours = [item for item in self.contracts.values() if item.host.machine_id == machine]
        if all(item.is_bid for item in ours):
            self.asks[self._number()] = machine

    def _offer(self, ask: int, machine: int, disk: float, bid: bool) -> dict[str, Any]:
        host = self.hosts[machine]
        beaten = dataclasses.replace(host, min_bid=self.price_to_beat(host))
        return beaten.offer(ask, disk, bid=bid)

    def _readable(self, contract: Contract) -> bool:
        return self.now() >= contract.created_at + self.read_lag_s

    def _number(self) -> int:
        self._next_id += self._random.randrange(1, 40)
        return self._next_id

    def _contract(self, host: Host, body: Mapping[str, Any]) -> Contract:
        now = self.now()
        env = body.get("env")
        price = body.get("price")
        disk = number(body.get("disk"), 10.0)
        return Contract(
            id=self._number(),
            host=host,
            label=str(body.get("label") or ""),
            image=str(body.get("image")),
            disk=disk,
            # A string of docker flags is not applied by the REST API.
            env={str(k): str(v) for k, v in env.items()} if isinstance(env, Mapping) else {},
            onstart=str(body.get("onstart") or ""),
            args=[str(item) for item in body.get("args") or []],
            runtype=str(body.get("runtype") or "ssh"),
            key=secrets.token_hex(32),
            gpu_price=host.dph_base if price is None else number(price, host.dph_base),
            is_bid=price is not None,
            start_date=self._clock(),
            end_date=self.date(now + host.duration_s),
            created_at=now,
            truth=host.truth(disk),
        )
