"""What a training would cost, as rows of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.cli.client import Client
from orchestrator.cli.console import CliError, Exit, err, print_rows

#: What stands in an order's way whatever the market offers.
_WRONG = (Exit.USAGE, Exit.NOT_FOUND)

#: As wide as the plan's own names, below which these rows stand.
UNDER = "  {:11}"


def estimate(body: Mapping[str, Any], *, images: int, size: int) -> dict[str, Any] | None:
    """The server's estimate for an order whose photographs are still here, and its rows on
    stderr; None where no server, or no market, can be asked.

    Raises: CliError, when the order itself is refused.
    """
    photographs = {"bytes": size, **({"images": images} if images else {})}
    try:
        found = Client.here().estimate({**body, **photographs})
    except CliError as error:
        if error.code in _WRONG:
            raise
        print_rows(err, [(UNDER.format("price"), f"not known now: {error.what}")])
        return None
    print_rows(err, [(UNDER.format(name.strip()), words) for name, words in _rows(found)])
    return found


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if found["price"]:
        rows.append(("  price", f"{found['price']['display']}, expected"))
        time_ = found["time"]
        parts = (
            f"boot {span(time_['boot_s'])}, downloads {span(time_['downloads_s'])}, "
            f"training {span(time_['training_s'])}"
        )
        rows.append(("  time", f"{time_['display']}: {parts}"))
        first = found["candidates"][0]
        per_hour = f"${first['price_per_hour'] / 1e6:.2f}/h"
        rows.append(("  now", f"{first['gpu']} at {per_hour}; {found['offers_fit']} offers fit"))
    else:
        rows.append(("  price", f"no offer fits now: {found['no_offer']}"))
    if found["offers_refused"]:
        counted = sorted(found["offers_refused"].items(), key=lambda item: (-item[1], item[0]))
        rows.append(("  refused", ", ".join(f"{count} {reason}" for reason, count in counted)))
    if not found["cap"]["suffices"]:
        rows.append(("  cap", f"too low: {found['cap']['message']}"))
    rows += [("  it waits", brake["message"]) for brake in found["brakes"]]
    rows += [("  assumed", words) for words in found["assumed"]]
    return rows


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
