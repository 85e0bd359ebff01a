"""What the market charged: the whole truth by label, or an error; never a part."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from state.errors import Refused, Unreadable

SINCE = datetime(2026, 11, 22, 12, tzinfo=UTC)


def charge(label: str, amount: Any, source: str = "instance-1") -> dict[str, Any]:
    return {"source": source, "amount": amount, "metadata": {"label": label}}


def page(*rows: Any, total: int, token: str | None = None) -> dict[str, Any]:
    return {"success": True, "results": list(rows), "total": total, "next_token": token}


def test_charges_of_all_pages_are_summed_by_label_and_others_left_out(hostile: Any) -> None:
    first = page(charge("a", 0.5), charge("b", 1.0), total=4, token="next")
    second = page(charge("a", 0.25, "instance-2"), charge("x", 9.0), total=4)
    hostile.answers(hostile.http(200, first), hostile.http(200, second))
    charged = hostile.provider().charges(["a", "b", "c"], SINCE)
    assert charged == {"a": 750_000, "b": 1_000_000}
    assert "after_token=next" in hostile.seen[1].path


@pytest.mark.parametrize(
    "body",
    [
        page(charge("a", 0.5), total=2),
        page(charge("a", "much"), total=1),
        page({"source": "instance-1", "amount": 1.0}, total=1),
        page(None, total=1),
        {"success": False, "error": "deprecated_endpoint"},
        {"success": True},
        "<html>busy</html>",
        "",
    ],
)
def test_a_bill_that_cannot_be_read_whole_is_none(hostile: Any, body: Any) -> None:
    hostile.answers(hostile.http(410 if "error" in body else 200, body))
    with pytest.raises((Unreadable, Refused)):
        hostile.provider().charges(["a"], SINCE)
