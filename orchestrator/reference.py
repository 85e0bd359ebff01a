"""Pages of the reference that are drawn from the API, the webhooks and the recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from gpu_agent.recipe import FAMILIES, QUALITIES, RULES, Recipe
from state import endpoints
from state.endpoints import Endpoint

_METHODS = ("get", "post", "put", "patch", "delete")


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


# --- the API ----------------------------------------------------------------------------------

_API = """\
# The API

Drawn from the specification by `stoker docs api`; do not edit. A running installation serves it as
`/openapi.json` (OpenAPI 3.1); [openapi.json](openapi.json) is the same.

`Authorization: Bearer stk_live_…` or `stk_test_…`. Times are RFC 3339 in UTC, money is in micro-USD
(a millionth of a dollar), ids have a prefix and sort by time, unknown fields are refused.

Every error is `application/problem+json` ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)):

```json
{"type": "about:blank", "title": "Unprocessable Entity", "status": 422,
 "detail": "the job cannot be ordered; see errors", "code": "invalid", "retryable": false,
 "request_id": "req_01k9", "errors": [{"pointer": "/recipe/rank", "detail": "…"}]}
```

`code` is for programs and never changes its spelling; `retryable` says whether the same request may
succeed later, `Retry-After` when. `X-Request-Id` comes back, and is in our logs.\
"""


def api_page(spec: Mapping[str, Any]) -> str:
    """The whole of `docs/api.md`, from an OpenAPI document."""
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, item in spec["paths"].items():
        for method in _METHODS:
            if method in item:
                tag = item[method].get("tags", ["others"])[0]
                by_tag.setdefault(tag, []).append((method, path, item[method]))
    schemas = spec["components"]["schemas"]
    lines = [_API]
    for tag, operations in by_tag.items():
        lines.append(f"\n## {tag.replace('_', ' ').replace('-', ' ').capitalize()}")
        for method, path, operation in operations:
            lines += _operation(method, path, operation, schemas)
    lines.append("\n## What is sent and answered")
    for name, schema in sorted(schemas.items()):
        if "properties" in schema and name != "Problem":
            lines += _schema(name, schema, schemas)
    return "\n".join(lines) + "\n"


def _operation(
    method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]
) -> Iterator[str]:
    yield f"\n### `{method.upper()} {path}`\n"
    yield f"{operation.get('summary') or operation['operationId']}."
    if operation.get("description"):
        yield f"\n{operation['description']}"
    asked = [item for item in operation.get("parameters", ()) if item["in"] != "path"]
    if asked:
        yield ""
        yield from _table(
            ("parameter", "in", "type", "meaning"),
            (
                (
                    f"`{item['name']}`",
                    item["in"],
                    _type(item.get("schema", {}), schemas),
                    item.get("description", ""),
                )
                for item in asked
            ),
        )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        yield f"\nBody: {_type(body['schema'], schemas)}."
    for status, answer in operation["responses"].items():
        if status < "400":
            kinds = answer.get("content", {}).values()
            shown = ", ".join(_type(kind["schema"], schemas) for kind in kinds if "schema" in kind)
            yield f"\nAnswers {status}{': ' + shown if shown else ''}."


def _schema(name: str, schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n### {name} {{ #schema-{name.lower()} }}\n"
    if schema.get("description"):
        yield f"{schema['description']}\n"
    needed = schema.get("required", ())
    yield from _table(
        ("field", "type", "", "meaning"),
        (
            (
                f"`{field}`",
                _type(value, schemas),
                "required" if field in needed else _default(value),
                value.get("description", "").replace("\n", " "),
            )
            for field, value in schema["properties"].items()
        ),
    )


def _default(value: Mapping[str, Any]) -> str:
    return f"default `{json.dumps(value['default'])}`" if "default" in value else ""


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if "properties" not in schemas[name]:  # a list of words, said where it is used
            return _type(schemas[name], schemas)
        return f"[{name}](#schema-{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_type(item, schemas) for item in schema[key])
    if "enum" in schema:
        return ", ".join(f"`{item}`" for item in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    kind = str(schema.get("type", "anything"))
    return f"{kind} ({schema['format']})" if "format" in schema else kind


# --- webhooks ---------------------------------------------------------------------------------

_EVENTS = """\
# Webhooks

Drawn from `state/endpoints.py` by `stoker docs events`; do not edit.

Signed by [Standard Webhooks](https://www.standardwebhooks.com/): `webhook-id`, `webhook-timestamp`,
`webhook-signature: v1,<base64>` over `id.timestamp.body`. At least once, in order per job as far as
the endpoint answers; `webhook-id` is the same on every try, and `data.seq` counts a job's events.
Only a 2xx is success; redirects are not followed; 410 disables the endpoint; the `Retry-After` of a
429 or 5xx is obeyed. Tries come after 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h and 24 h.
[How to receive them](how-to/webhooks.md).\
"""


def events_page() -> str:
    """The whole of `docs/events.md`."""
    endpoint = Endpoint(id="we_example", owner="", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    lines = [_EVENTS, ""]
    lines += _table(
        ("type", "sent when"), ((f"`{kind}`", what) for kind, what in endpoints.TYPES.items())
    )
    for kind in endpoints.TYPES:
        sample = endpoints.sample(kind, endpoint, 7, "2026-01-01T00:00:00.000Z")
        lines += [f"\n## `{kind}`\n", "```json", json.dumps(sample, indent=2), "```"]
    return "\n".join(lines) + "\n"


# --- the recipe -------------------------------------------------------------------------------

_RECIPE = """\
# The recipe

Drawn from `gpu_agent/recipe.py` by `stoker docs recipe`; do not edit.

`recipe` of a job says how to train. What it does not say comes from the dial `quality`, then from
the family, then from the table. An unknown key is an error. A job shows the whole recipe that
followed. [trainer.md](trainer.md) says what each is good for.
"""


def recipe_page() -> str:
    """The whole of `docs/recipe.md`."""
    meanings = _meanings()
    lines = [_RECIPE]
    lines += _table(
        ("key", "default", "takes", "meaning"),
        (
            (
                f"`{item.name}`",
                f"`{json.dumps(item.default)}`",
                RULES[item.name][1],
                meanings[item.name],
            )
            for item in dataclasses.fields(Recipe)
        ),
    )
    for title, table in (("The dial", QUALITIES), ("Families", FAMILIES)):
        lines += [f"\n## {title}\n"]
        lines += _table(
            ("", "sets"),
            (
                (
                    f"`{name}`",
                    ", ".join(f"`{key}` {json.dumps(value)}" for key, value in said.items()),
                )
                for name, said in table.items()
            ),
        )
    return "\n".join(lines) + "\n"


def _meanings() -> dict[str, str]:
    """By key, what the docstring of `Recipe` says of it; several keys may share a text."""
    text = inspect.cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + text.rstrip()):
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = " ".join(meaning.split())
    return found
