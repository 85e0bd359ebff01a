"""Commands for webhooks: where they go, what came of each, and trying them out at one's desk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from orchestrator.cli.client import Client
from orchestrator.cli.completion import deliveries as delivery_ids
from orchestrator.cli.completion import endpoints as endpoint_ids
from orchestrator.cli.completion import events as event_types
from orchestrator.cli.console import CliError, Exit, err, out, print_json, print_rows
from orchestrator.cli.jobs import AsJson
from orchestrator.cli.listen import listen

ENDPOINTS = "/v1/webhook-endpoints"
DELIVERIES = "/v1/deliveries"
#: Seconds between two looks at what came of a webhook.
LOOK_S = 0.5
_ENDPOINT = frozenset({"id", "url", "events", "enabled", "disabled_why", "created_at"})
_DELIVERY = frozenset({"id", "type", "status", "tries", "created_at"})

EndpointId = Annotated[
    str,
    typer.Argument(
        help="The endpoint's id, as `stoker webhooks ls` shows it.", autocompletion=endpoint_ids
    ),
]
DeliveryId = Annotated[
    str,
    typer.Argument(
        help="Its id (the webhook-id), as `stoker deliveries ls` shows it.",
        autocompletion=delivery_ids,
    ),
]
Events = Annotated[
    str, typer.Option(help="Only these, with commas between: job.completed,job.failed.")
]
Description = Annotated[str, typer.Option(help="For people; whose it is, say.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the answer; 0: do not.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Where webhooks go: endpoints, their filters and their secrets.")
    for command in (ls, add, show, rotate, enable, disable, rm):
        group.command()(command)
    group.command("test")(send_test)
    app.add_typer(group, name="webhooks", no_args_is_help=True)
    events = typer.Typer(help="Send what happened once more.")
    # one command alone would take the group's place
    events.callback()(lambda: None)
    events.command()(resend)
    app.add_typer(events, name="events", no_args_is_help=True)
    log = typer.Typer(help="Webhooks that were sent or are owed, and what was answered.")
    log.command("ls")(ls_deliveries)
    log.command("show")(show_delivery)
    app.add_typer(log, name="deliveries", no_args_is_help=True)
    app.command()(trigger)
    app.command()(listen)


# --- endpoints --------------------------------------------------------------------------------


def ls(as_json: AsJson = False) -> None:
    """List the endpoints.

    Example: stoker webhooks ls

    JSON: a list of endpoints, each as `GET /v1/webhook-endpoints/{id}` answers.
    """
    found = _all(Client.here())
    if as_json:
        print_json(found)
    elif found:
        print_rows(out, [("ID", "URL", "EVENTS", "STATE", "DESCRIPTION"), *map(_row, found)])
    else:
        err.print("no endpoint yet: `stoker webhooks add https://…`", markup=False)


def add(
    url: Annotated[str, typer.Argument(help="An https URL that takes POSTs.")],
    events: Events = "",
    description: Description = "",
    as_json: AsJson = False,
) -> None:
    """Tell of all jobs at one more place; its secret is shown once.

    Example: stoker webhooks add https://example.com/hooks --events job.completed,job.failed

    JSON: the endpoint, as `GET /v1/webhook-endpoints/{id}` answers, and its `secret`.
    """
    body = {"url": url, "events": split(events), "description": description}
    made = _shaped(Client.here(), Client.here().post(ENDPOINTS, body), _ENDPOINT | {"secret"})
    _print_new(made, as_json)


def show(endpoint: EndpointId, as_json: AsJson = False) -> None:
    """Show one endpoint.

    Example: stoker webhooks show we_01k9…

    JSON: the endpoint, as `GET /v1/webhook-endpoints/{id}` answers.
    """
    client = Client.here()
    _print(_shaped(client, _at(client, "GET", endpoint), _ENDPOINT), as_json)


def send_test(
    endpoint: EndpointId,
    event: Annotated[
        str, typer.Option(help="A sample of this event instead.", autocompletion=event_types)
    ] = "webhook.test",
    wait: Wait = 15.0,
    as_json: AsJson = False,
) -> None:
    """Send a test webhook, and show what was answered.

    Example: stoker webhooks test we_01k9…

    JSON: a list of deliveries, each as `GET /v1/deliveries/{id}` answers.
    """
    client = Client.here()
    sent = _at(client, "POST", endpoint, "/test", {"type": event})
    _follow(client, [sent], wait, as_json)


def rotate(
    endpoint: EndpointId,
    overlap: Annotated[
        float, typer.Option(help="Hours for which the old secret is good too; 0: it leaked.")
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Make another secret, shown once. Until the overlap ends, both sign.

    Example: stoker webhooks rotate we_01k9… --overlap 48

    JSON: the endpoint, as `GET /v1/webhook-endpoints/{id}` answers, and its new `secret`.
    """
    client = Client.here()
    body = {"overlap_s": round(overlap * 3600)}
    made = _at(client, "POST", endpoint, "/rotate-secret", body)
    _print_new(_shaped(client, made, _ENDPOINT | {"secret"}), as_json)


def enable(endpoint: EndpointId, as_json: AsJson = False) -> None:
    """Send to an endpoint again; what was not sent meanwhile, `stoker events resend` sends.

    Example: stoker webhooks enable we_01k9…

    JSON: the endpoint, as `GET /v1/webhook-endpoints/{id}` answers.
    """
    _change(endpoint, {"enabled": True}, as_json)


def disable(endpoint: EndpointId, as_json: AsJson = False) -> None:
    """Send nothing more to an endpoint, nor what waits for it.

    Example: stoker webhooks disable we_01k9…

    JSON: the endpoint, as `GET /v1/webhook-endpoints/{id}` answers.
    """
    _change(endpoint, {"enabled": False}, as_json)


def rm(endpoint: EndpointId, as_json: AsJson = False) -> None:
    """Delete an endpoint and its secret. `disable` is what can be taken back.

    Example: stoker webhooks rm we_01k9…

    JSON: {deleted}, the endpoint's id.
    """
    _asked(Client.here(), "DELETE", f"{ENDPOINTS}/{quote(endpoint, safe='')}", None)
    if as_json:
        print_json({"deleted": endpoint})
    else:
        err.print(f"deleted {endpoint}", markup=False)


def split(events: str) -> list[str]:
    return [name.strip() for name in events.split(",") if name.strip()]


def _change(endpoint: str, body: Mapping[str, Any], as_json: bool) -> None:
    client = Client.here()
    _print(_shaped(client, _at(client, "PATCH", endpoint, "", body), _ENDPOINT), as_json)


def _all(client: Client, *, mine: bool = False) -> list[dict[str, Any]]:
    page = client.get(ENDPOINTS, **({"mine": "true"} if mine else {}))
    listed = page.get("data") if isinstance(page.get("data"), list) else None
    if listed is None:
        raise _strange(client, "its answer holds no list")
    return [_shaped(client, item, _ENDPOINT) for item in listed]


def _at(
    client: Client,
    method: str,
    endpoint: str,
    below: str = "",
    body: Mapping[str, Any] | None = None,
) -> Any:
    return _asked(client, method, f"{ENDPOINTS}/{quote(endpoint, safe='')}{below}", body)


def _asked(client: Client, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
    """The answer's document; None when it has none. Raises: CliError that names our lists."""
    try:
        answer = client.call(method, path, **({} if body is None else {"json": body}))
    except CliError as error:
        if error.code is Exit.NOT_FOUND:
            what = "deliveries" if path.startswith(DELIVERIES) else "webhooks"
            error.then = f"`stoker {what} ls` lists what there is"
        elif error.then.startswith("`stoker show JOB`"):
            error.then = "`stoker webhooks ls` says how it stands"
        raise
    if answer.status_code == 204:
        return None
    try:
        return answer.json()
    except ValueError:
        raise _strange(client, "it answered without a JSON document") from None


def _shaped(client: Client, value: Any, keys: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not keys <= set(value):
        lacks = ", ".join(sorted(keys - set(value if isinstance(value, dict) else ())))
        raise _strange(client, f"its answer lacks {lacks}")
    return value


def _strange(client: Client, why: str) -> CliError:
    return CliError(
        f"{client.url} does not speak Stoker's API",
        why,
        "check STOKER_URL, and what stands between (a proxy, a login page)",
    )


def _row(endpoint: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        endpoint["id"],
        endpoint["url"] or "(stoker listen)",
        ",".join(endpoint["events"]) or "all",
        _state(endpoint),
        " ".join(str(endpoint.get("description") or "-").split()),
    )


def _state(endpoint: Mapping[str, Any]) -> str:
    if not endpoint["enabled"]:
        return f"DISABLED ({endpoint['disabled_why']})"
    return "ok"


def _print(endpoint: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(endpoint)
        return
    rows = [
        ("id", endpoint["id"]),
        ("url", endpoint["url"] or "(stoker listen)"),
        ("events", ", ".join(endpoint["events"]) or "all"),
        ("state", _state(endpoint)),
        ("description", endpoint.get("description") or "-"),
        ("created", endpoint["created_at"]),
    ]
    if endpoint.get("old_secret_until"):
        rows.append(("old secret until", endpoint["old_secret_until"]))
    if "secret" in endpoint:
        rows.append(("secret", endpoint["secret"]))
    print_rows(out, rows)


def _print_new(endpoint: Mapping[str, Any], as_json: bool) -> None:
    _print(endpoint, as_json)
    if not as_json:
        err.print(
            "keep the secret: it is not shown again; receivers verify signatures with it",
            markup=False,
        )


# --- deliveries -------------------------------------------------------------------------------


def ls_deliveries(
    job: Annotated[str, typer.Option(help="Of this job.")] = "",
    endpoint: Annotated[
        str,
        typer.Option(
            help="To this endpoint; `job`: jobs' own webhooks.", autocompletion=endpoint_ids
        ),
    ] = "",
    status: Annotated[str, typer.Option(help="waiting, delivered, exhausted or disabled.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="At most so many.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List webhooks, newest first.

    Example: stoker deliveries ls --status exhausted

    JSON: a list of deliveries, each as `GET /v1/deliveries` lists them.
    """
    client = Client.here()
    asked = {"job": job, "endpoint": endpoint, "status": status}
    found = _listed(client, {key: value for key, value in asked.items() if value}, limit)
    if as_json:
        print_json(found)
    elif found:
        now = datetime.now(UTC)
        title = ("ID", "TYPE", "STATUS", "TRIES", "LAST ANSWER", "AGE")
        print_rows(out, [title, *(_line(item, now) for item in found)])
    else:
        err.print("no such webhook", markup=False)


def _listed(client: Client, asked: Mapping[str, str], limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        more = {"cursor": cursor} if cursor else {}
        page = client.get(DELIVERIES, limit=min(100, limit - len(found)), **asked, **more)
        if not isinstance(page.get("data"), list):
            raise _strange(client, "its answer holds no list")
        found += [_shaped(client, item, _DELIVERY) for item in page["data"]]
        cursor = page.get("next_cursor")
        if not page.get("has_more") or not cursor:
            break
    return found


def show_delivery(delivery: DeliveryId, as_json: AsJson = False) -> None:
    """Show a webhook: what it says, and each answer.

    Example: stoker deliveries show job_01k9….3

    JSON: the delivery, as `GET /v1/deliveries/{id}` answers.
    """
    client = Client.here()
    path = f"{DELIVERIES}/{quote(delivery, safe='')}"
    found = _shaped(client, _asked(client, "GET", path, None), _DELIVERY | {"payload"})
    if as_json:
        print_json(found)
        return
    rows = [(key, str(found.get(key) or "-")) for key in ("id", "type", "status", "created_at")]
    print_rows(out, [*rows, ("endpoint", found.get("endpoint") or "the job's own webhook")])
    for item in found["tries"]:
        out.print(f"  {item['tried_at']}  {_answer(item)}", markup=False, soft_wrap=True)
    print_json(found["payload"])


def _line(delivery: Mapping[str, Any], now: datetime) -> tuple[str, ...]:
    tries = delivery["tries"]
    age = (now - datetime.fromisoformat(delivery["created_at"])).total_seconds()
    return (
        delivery["id"],
        delivery["type"],
        delivery["status"],
        str(len(tries)),
        _answer(tries[-1]) if tries else "-",
        _ago(age),
    )


def _answer(item: Mapping[str, Any]) -> str:
    said = str(item["answer"]) if item["answer"] else str(item.get("error") or "no answer")
    return f"{said} ({item['took_ms']} ms)"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def resend(delivery: DeliveryId, wait: Wait = 15.0, as_json: AsJson = False) -> None:
    """Send a webhook once more, under its old webhook-id, and show what was answered.

    Example: stoker events resend job_01k9….3

    JSON: a list of deliveries, each as `GET /v1/deliveries/{id}` answers.
    """
    client = Client.here()
    path = f"{DELIVERIES}/{quote(delivery, safe='')}/replay"
    _follow(client, [_asked(client, "POST", path, None)], wait, as_json)


def trigger(
    event: Annotated[
        str,
        typer.Argument(help="Its type: job.completed, say.", autocompletion=event_types),
    ],
    endpoint: Annotated[
        str,
        typer.Option(help="Only to this one; else to all of yours.", autocompletion=endpoint_ids),
    ] = "",
    wait: Wait = 15.0,
    as_json: AsJson = False,
) -> None:
    """Send a sample of an event to your endpoints, whatever their filters say.

    Example: stoker trigger job.completed

    JSON: a list of deliveries, each as `GET /v1/deliveries/{id}` answers.
    """
    client = Client.here()
    mine = [] if endpoint else [item["id"] for item in _all(client, mine=True) if item["enabled"]]
    names = [endpoint] if endpoint else mine
    if not names:
        raise CliError(
            "there is nowhere to send it",
            "no webhook endpoint is enabled",
            "`stoker webhooks add https://…`, or `stoker listen` beside this",
        )
    sent = [_at(client, "POST", name, "/test", {"type": event}) for name in names]
    _follow(client, sent, wait, as_json)


def _follow(
    client: Client,
    sent: Iterable[Any],
    wait: float,
    as_json: bool,
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Show what is answered to webhooks that were just sent: their next try.

    Raises:
        CliError: not all of them were taken (1), or no answer came in time (8).
    """
    left = {item["id"]: item for item in (_shaped(client, item, _DELIVERY) for item in sent)}
    before = {name: len(item["tries"]) for name, item in left.items()}
    done: list[dict[str, Any]] = []
    until = monotonic() + wait
    while wait > 0:
        for name in list(left):
            path = f"{DELIVERIES}/{quote(name, safe='')}"
            left[name] = _shaped(client, client.get(path), _DELIVERY)
            if len(left[name]["tries"]) > before[name] or left[name]["status"] == "disabled":
                done.append(left.pop(name))
        if not left or monotonic() >= until:
            break
        sleep(LOOK_S)
    if as_json:
        print_json([*done, *left.values()])
    else:
        for item in [*done, *left.values()]:
            latest = item["tries"][before[item["id"]] :]
            said = _answer(latest[-1]) if latest else item["status"]
            out.print(f"{item['id']}  {item['type']}  {said}", markup=False, soft_wrap=True)
    if wait <= 0:
        return
    if left:
        raise CliError(
            "" if as_json else f"{len(left)} of {len(left) + len(done)} had no answer yet",
            f"{wait:g} seconds have passed; it is still being tried",
            f"`stoker deliveries show {next(iter(left))}`",
            Exit.TIMED_OUT,
        )
    bad = [item for item in done if item["status"] != "delivered"]
    if bad:
        raise CliError(
            "" if as_json else f"{len(bad)} of {len(done)} were not taken",
            "only an answer of 2xx counts",
            f"`stoker deliveries show {bad[0]['id']}`",
        )
