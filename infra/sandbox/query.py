"""What a search or a list asks for: filters, order, and the cursor between pages."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any


def matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    return all(
        _compare(_column(row, column), operator, wanted)
        for column, conditions in filters.items()
        for operator, wanted in conditions.items()
    )


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column == "verified":
        return row.get("verification") == "verified"
    # Filtering offers on `id` matches nothing; `ask_contract_id` is the way.
    if column == "id" and "ask_contract_id" in row:
        return None
    return row.get(column)


def _compare(value: Any, operator: str, wanted: Any) -> bool:
    if operator in ("in", "notin"):
        options = wanted if isinstance(wanted, list) else [wanted]
        within = any(_compare(value, "eq", option) for option in options)
        return within is (operator == "in")
    if isinstance(value, str) and isinstance(wanted, str):
        left, right = value, wanted
        # A place is filtered by its country: the offer says "Ohio, US", the filter "US".
        if operator == "eq" and len(right) == 2 and left.endswith(f", {right}"):
            return True
    else:
        left, right = _sortable(value), _sortable(wanted)
        if value is None:
            return operator == "neq"
    return bool(
        {
            "eq": lambda: left == right,
            "neq": lambda: left != right,
            "gt": lambda: left > right,
            "gte": lambda: left >= right,
            "lt": lambda: left < right,
            "lte": lambda: left <= right,
        }.get(operator, lambda: False)()
    )


def _sortable(value: Any) -> Any:
    """Numbers may come as strings; what has no order comes first."""
    if isinstance(value, str):
        try:
            return (1, float(value), "")
        except ValueError:
            return (2, 0.0, value)
    return (1, float(value), "") if isinstance(value, int | float) else (0, 0.0, "")


def sort(rows: list[dict[str, Any]], order: Sequence[tuple[str, str]]) -> None:
    for column, direction in reversed(order):
        rows.sort(key=lambda row: _sortable(row.get(column)), reverse=direction == "desc")


def order(order: Any) -> list[tuple[str, str]]:
    """`[["dph_total", "asc"]]` of a search, or `[{"col": "id", "dir": "asc"}]` of a list."""
    pairs = []
    for item in order if isinstance(order, list) else []:
        if isinstance(item, Mapping):
            pairs.append((str(item.get("col")), str(item.get("dir"))))
        elif isinstance(item, list) and len(item) == 2:
            pairs.append((str(item[0]), str(item[1])))
    return pairs


def number(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def token(position: int, last: Any) -> str:
    return base64.b64encode(json.dumps({"values": {"id": last}, "at": position}).encode()).decode()


def read_token(token: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Where the page after `token` begins. Raises: ValueError."""
    try:
        read = json.loads(base64.b64decode(token, validate=True))
        position, last = int(read["at"]), read["values"]["id"]
    except (binascii.Error, ValueError, KeyError, TypeError):
        raise ValueError("after_token cannot be read") from None
    ids = [row["id"] for row in rows]
    return ids.index(last) + 1 if last in ids else min(position, len(rows))
