"""Clients made from our description: they are generated, compile, and verify what we sign."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_agent import wire

Find = Callable[[str, str, str], str]
SECRET = wire.new_secret()
BODY = json.dumps({"type": "job.completed", "timestamp": "x", "data": {"job": "job_1"}}).encode()


def signed(body: bytes = BODY, secret: str = SECRET, at: float | None = None) -> dict[str, str]:
    at = time.time() if at is None else at
    return wire.sign(body, secrets=[secret], webhook_id="job_1.7", at=at)


def bad() -> list[tuple[str, bytes, dict[str, str]]]:
    """Deliveries that are none of ours, whatever they try."""
    good = signed()
    return [
        ("another body", BODY + b" ", good),
        ("another secret", BODY, signed(secret=wire.new_secret())),
        ("too old", BODY, signed(at=time.time() - 3600)),
        ("no headers", BODY, {}),
        ("no signature", BODY, {**good, "webhook-signature": ""}),
        ("garbage for a signature", BODY, {**good, "webhook-signature": "garbage"}),
        ("not base64", BODY, {**good, "webhook-signature": "v1,abc"}),
        ("two commas", BODY, {**good, "webhook-signature": "v1,aa,bb"}),
        ("garbage for a time", BODY, {**good, "webhook-timestamp": "yesterday"}),
        ("a body that is no text", b"\xff\xfe", signed(b"\xff\xfe", wire.new_secret())),
    ]


AS_SENT = {"content-type": "application/json"}


def cases() -> list[tuple[str, str, dict[str, str]]]:
    """Name, body in hex, headers; signed now, for a signature is good for minutes only."""
    tries = [("good", BODY, signed()), *bad()]
    return [(name, body.hex(), AS_SENT | headers) for name, body, headers in tries]


def judged(told: dict[str, int]) -> None:
    assert told.pop("good") == 204
    assert set(told.values()) == {401}, told


# --- Python -----------------------------------------------------------------------------------


def test_the_whole_api_is_generated_without_a_warning(made: Any) -> None:
    spec = json.loads((Path(__file__).parents[3] / "docs/openapi.json").read_text())
    operations = {
        operation["operationId"]
        for path in spec["paths"].values()
        for operation in path.values()
        if isinstance(operation, dict)
    }
    modules = {path.stem for path in made.folder.glob("stoker_client/api/*/*.py")}
    assert operations <= modules
    told = made.run(
        "import importlib, pkgutil, stoker_client as c\n"
        "for module in pkgutil.walk_packages(c.__path__, 'stoker_client.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('all')"
    )
    assert told == "all\n"


def test_what_we_add_is_typed(made: Any) -> None:
    argv = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(made.python)]
    told = subprocess.run(
        [*argv, "--no-error-summary", "stoker_client"],
        cwd=made.folder,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    ours = ("training.py", "webhooks.py", "_wire.py")
    assert [line for line in told.splitlines() if line.partition(":")[0].endswith(ours)] == []


def test_the_client_verifies_good_deliveries_and_refuses_bad_ones(made: Any, snippet: Find) -> None:
    tries = [("good", BODY, signed()), *bad()]
    cases = [(name, body.hex(), headers) for name, body, headers in tries]
    program = (
        f"import json, os\nos.environ['STOKER_WEBHOOK_SECRET'] = {SECRET!r}\n"
        + snippet("how-to/clients.md", "python", "def event_of")
        + f"\ncases = json.loads({json.dumps(cases)!r})\n"
        "print(json.dumps({n: event_of(bytes.fromhex(b), h) for n, b, h in cases}))"
    )
    told = json.loads(made.run(program))
    assert told.pop("good")["data"] == {"job": "job_1"}
    assert set(told.values()) == {None}


def test_flasks_snippet_takes_good_deliveries_and_refuses_bad_ones(
    snippet: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_WEBHOOK_SECRET", SECRET)
    told: dict[str, Any] = {"__name__": "snippet"}
    exec(snippet("how-to/webhooks.md", "python", "from flask"), told)  # noqa: S102 -- our own page
    client = told["app"].test_client()
    answer = client.post("/hooks/stoker", data=BODY, headers=signed())
    assert answer.status_code == 204
    for name, body, headers in bad():
        answer = client.post("/hooks/stoker", data=body, headers=headers)
        assert answer.status_code == 401, name


def test_djangos_snippet_takes_good_deliveries_and_refuses_bad_ones(
    made: Any, snippet: Find
) -> None:
    program = f"""
import json, os
os.environ["STOKER_WEBHOOK_SECRET"] = {SECRET!r}
import django
from django.conf import settings
settings.configure(ALLOWED_HOSTS=["*"])
django.setup()
from django.test import RequestFactory
{snippet("how-to/webhooks.md", "python", "from django")}
told = {{}}
for name, body, headers in {json.dumps(cases())}:
    kind = headers.pop("content-type")
    path, sent = "/hooks/stoker", bytes.fromhex(body)
    request = RequestFactory().post(path, sent, content_type=kind, headers=headers)
    told[name] = stoker(request).status_code
print(json.dumps(told))
"""
    judged(json.loads(made.run(program).splitlines()[-1]))


# --- JavaScript -------------------------------------------------------------------------------


def node_run(node: Path, name: str, text: str) -> Any:
    (node / name).write_text(text)
    done = subprocess.run(
        ["node", name],
        cwd=node,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "STOKER_WEBHOOK_SECRET": SECRET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_expresss_snippet_takes_good_deliveries_and_refuses_bad_ones(
    node: Path, snippet: Find
) -> None:
    text = snippet("how-to/webhooks.md", "js", "express")
    text += f"""
const server = app.listen(0, async () => {{
  const told = {{}};
  for (const [name, body, headers] of {json.dumps(cases())}) {{
    const url = `http://127.0.0.1:${{server.address().port}}/hooks/stoker`;
    const answer = await fetch(url, {{ method: "POST", body: Buffer.from(body, "hex"), headers }});
    told[name] = answer.status;
  }}
  console.log(JSON.stringify(told));
  server.closeAllConnections();
  server.close();
}});
"""
    judged(node_run(node, "express.js", text))


def test_nexts_snippet_takes_good_deliveries_and_refuses_bad_ones(
    node: Path, snippet: Find
) -> None:
    text = snippet("how-to/webhooks.md", "js", "export async function POST")
    text += f"""
const told = {{}};
for (const [name, body, headers] of {json.dumps(cases())}) {{
  const url = "https://app.test/hooks/stoker";
  const request = new Request(url, {{ method: "POST", body: Buffer.from(body, "hex"), headers }});
  told[name] = (await POST(request)).status;
}}
console.log(JSON.stringify(told));
"""
    judged(node_run(node, "next.js", text))


def test_typescript_types_are_generated_and_the_snippet_compiles(node: Path, snippet: Find) -> None:
    spec = Path(__file__).parents[3] / "docs/openapi.json"
    types = ["npx", "openapi-typescript", str(spec), "--default-non-nullable=false"]
    (node / "use.ts").write_text(
        snippet("how-to/clients.md", "ts", "import type")
        + "// @ts-expect-error -- a number is no id; were it let through, this line would fail\n"
        + 'export const wrong: Order = { dataset_id: 5, base: "civitai:128713" };\n'
    )
    compiler = ["npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]
    for argv in ([*types, "-o", "stoker.d.ts"], [*compiler, "--lib", "es2022,dom", "use.ts"]):
        done = subprocess.run(argv, cwd=node, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
