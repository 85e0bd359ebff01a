"""What a user of the command line sees: answers, errors, exit codes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import typer

from orchestrator.cli.app import make_app
from orchestrator.cli.console import Exit

#: What only commands that run something may wait for.
HEAVY = frozenset(
    {
        "PIL", "alembic", "boto3", "botocore", "celery", "flask", "flask_openapi", "granian",
        "opentelemetry", "psycopg", "pydantic", "redis", "skimage", "sqlalchemy", "structlog",
        "torch", "vastai",
    }
)  # fmt: skip


def leaves(command, path=()):
    """Every command of the tree, with the words that call it."""
    below = getattr(command, "commands", None)
    if not below:
        yield path
        return
    for name, child in below.items():
        yield from leaves(child, (*path, name))


COMMANDS = sorted(leaves(typer.main.get_command(make_app(plain=True))))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(stoker, words):
    ran = stoker(*words, "--help")
    assert ran.code == Exit.OK
    assert "Example:" in ran.out
    assert "╭" not in ran.out


def test_help_waits_for_nothing_heavy():
    said = "from orchestrator.cli.app import run; import sys; sys.exit = lambda code: None; "
    asked = said + "run(['--help']); print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert "doctor" in ran.stdout
    assert HEAVY.isdisjoint(ran.stderr.split())


def test_the_help_for_terminals_can_be_drawn(capsys):
    for words in COMMANDS:
        make_app()([*words, "--help"], standalone_mode=False)
        assert "Example:" in capsys.readouterr().out


def test_the_commands_that_were_promised_are_there():
    first = {words[0] for words in COMMANDS}
    promised = "demo test up serve worker beat sandbox train ps show logs get cancel retry keys db"
    assert first >= {*promised.split(), "doctor", "sweep"}


def test_a_typo_gets_a_suggestion(stoker):
    ran = stoker("tran")
    assert ran.code == Exit.USAGE
    assert "Did you mean 'train'?" in ran.err
    assert "Did you mean --watch?" in stoker("ps", "--wach").err


def test_no_arguments_show_the_commands(stoker):
    ran = stoker()
    assert ran.code == Exit.USAGE
    assert "train" in ran.out + ran.err
    assert "error" not in ran.err


def test_a_missing_argument_names_the_help(stoker):
    ran = stoker("show")
    assert ran.code == Exit.USAGE
    assert "`stoker show --help`" in ran.err


def test_the_tests_are_of_the_checkout(stoker):
    ran = stoker("test")
    assert ran.code == Exit.USAGE
    assert "./stoker test" in ran.err


def test_without_a_server_it_says_what_to_set(stoker):
    ran = stoker("ps")
    assert ran.code == Exit.AUTH
    assert ran.out == ""
    what, why, then = ran.err.splitlines()
    assert what.startswith("error: ")
    assert why.startswith("  why: STOKER_URL and STOKER_API_KEY")
    assert then.startswith(" next: ")


def test_what_a_killed_up_left_is_not_believed(stoker, tmp_path):
    (tmp_path / ".stoker").mkdir()
    left = {"url": "http://127.0.0.1:9", "key": "k", "pid": 2**22 + 1, "env": {}}
    (tmp_path / ".stoker" / "beside.json").write_text(json.dumps(left))
    assert stoker("ps").code == Exit.AUTH
    (tmp_path / ".stoker" / "beside.json").write_text("{")
    assert stoker("ps").code == Exit.AUTH


def test_a_server_that_is_not_there_is_an_error_at_once(stoker, monkeypatch):
    monkeypatch.setenv("STOKER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("STOKER_API_KEY", "k")
    ran = stoker("ps")
    assert ran.code == Exit.FAILED
    assert "does not answer" in ran.err


@pytest.mark.parametrize("url", ["127.0.0.1:9", "ftp://host", "http://", "http://[::"])
def test_a_wrong_url_is_said_to_be_one(stoker, monkeypatch, url):
    monkeypatch.setenv("STOKER_URL", url)
    monkeypatch.setenv("STOKER_API_KEY", "k")
    assert stoker("ps").code == Exit.USAGE


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, Exit.AUTH),
        (403, Exit.AUTH),
        (404, Exit.NOT_FOUND),
        (409, Exit.FAILED),
        (422, Exit.USAGE),
        (429, Exit.FAILED),
        (500, Exit.FAILED),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(stoker, api, status, code):
    problem = {
        "detail": "the server's own words",
        "code": "some_code",
        "request_id": "req_1",
        "errors": [{"pointer": "/steps", "detail": "is too large"}],
    }
    api.answers["GET /v1/jobs/job_01"] = (status, problem)
    ran = stoker("show", "job_01")
    assert ran.code == code
    assert "the server's own words" in ran.err
    assert "/steps is too large" in ran.err
    assert ran.out == ""


def test_an_error_for_programs_is_one_document(stoker, api):
    ran = stoker("show", "job_01", "--json")
    assert ran.code == Exit.NOT_FOUND
    assert json.loads(ran.out)["error"]["exit"] == Exit.NOT_FOUND
    assert ran.err == ""


GARBAGE = [
    (200, b"<html>log in</html>"),
    (200, b""),
    (200, b"\xff\xfe"),
    (200, [1, 2]),
    (200, {"data": {"id": 1}}),
    (200, {"data": ["x"]}),
    (200, {"data": None}),
    (200, {"hello": "world"}),
    (204, b""),
    (301, b"", {"Location": "http://127.0.0.1:9/"}),
    (404, b"<html>nginx</html>"),
    (404, [1]),
    (422, {"errors": "none"}),
    (422, {"errors": [None, "x", {}]}),
]


@pytest.mark.parametrize("answer", GARBAGE, ids=repr)
@pytest.mark.parametrize("words", [("ps",), ("show", "job_01"), ("logs", "job_01")], ids=" ".join)
def test_garbage_from_the_server_is_an_error_and_no_trace(stoker, api, answer, words):
    for path in ("/v1/jobs", "/v1/jobs/job_01", "/v1/jobs/job_01/events"):
        api.answers[f"GET {path}"] = answer
    ran = stoker(*words)
    assert ran.code in (Exit.FAILED, Exit.NOT_FOUND, Exit.USAGE)
    assert ran.err.startswith("error: ")


def test_an_id_stays_one_part_of_the_path(stoker, api):
    assert stoker("cancel", "../keys?x=1").code == Exit.NOT_FOUND
    assert api.asked == ["POST /v1/jobs/..%2Fkeys%3Fx%3D1/cancel"]


def test_ps_lists_what_runs_in_columns(stoker, api, make_job):
    stalled = make_job(id="job_2", status="stalled", reason={"code": "x", "message": "it broke"})
    api.answers["GET /v1/jobs"] = [
        (200, {"data": [make_job()], "has_more": True, "next_cursor": "c"}),
        (200, {"data": [stalled], "has_more": False, "next_cursor": None}),
    ]
    ran = stoker("ps")
    title, first, second = ran.out.splitlines()
    at = title.index("STATUS")
    assert first[at:].startswith("training")
    assert second[at:].startswith("stalled")
    assert "40/100" in first
    assert second.endswith("it broke")
    assert "status=training" in api.asked[0]
    assert "status=completed" not in api.asked[0]
    assert "cursor=c" in api.asked[1]


def test_ps_of_nothing_says_what_to_do_on_stderr(stoker, api):
    api.answers["GET /v1/jobs"] = (200, {"data": [], "has_more": False})
    ran = stoker("ps")
    assert (ran.code, ran.out) == (0, "")
    assert "stoker train" in ran.err
    assert json.loads(stoker("ps", "-a", "--json").out) == []


def test_show_has_the_whole_sha256_and_no_box(stoker, api, make_job):
    files = [{"name": "lora.safetensors", "bytes": 3_000_000, "sha256": "ab" * 32}]
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(result_files=files, status="completed"))
    ran = stoker("show", "job_01")
    assert "ab" * 32 in ran.out
    assert "$0.0400 of at most $5.00" in ran.out
    assert json.loads(stoker("show", "job_01", "--json").out)["id"] == "job_01"


EVENTS = [
    {"at": "t1", "type": "transition", "data": {"from": "pending", "to": "pendingGpu"}},
    {"at": "t2", "type": "heartbeat", "data": {"phase": "training"}},
    {"at": "t3", "type": "log.lines", "data": {"lines": ["[bold]one", "two"]}},
    {"at": "t4", "type": "training.progress", "data": {"step": 3, "points": [[1, 2, 3]]}},
]


def test_logs_are_lines(stoker, api):
    page = {"data": EVENTS, "has_more": False, "next_after": 4}
    api.answers["GET /v1/jobs/job_01/events"] = (200, page)
    assert stoker("logs", "job_01").out.splitlines() == [
        "t1  transition  pending -> pendingGpu",
        "t3  | [bold]one",
        "t3  | two",
        "t4  training.progress  step=3",
    ]
    assert json.loads(stoker("logs", "job_01", "--json").out) == EVENTS


def test_following_logs_ends_with_the_job_and_loses_nothing(stoker, api, make_job):
    """What was written between the last page and the job's end is shown too."""
    pages = [(200, {"data": [event], "has_more": False, "next_after": 1}) for event in EVENTS]
    empty = (200, {"data": [], "has_more": False, "next_after": 1})
    api.answers["GET /v1/jobs/job_01/events"] = [*pages[:2], empty]
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(status="completed"))
    ran = stoker("logs", "-f", "job_01", "--json")
    assert [json.loads(line)["at"] for line in ran.out.splitlines()] == ["t1", "t2"]


def result(api, make_job, data=b"weights", sha256=None, name="lora.safetensors"):
    digest = sha256 or hashlib.sha256(data).hexdigest()
    files = [{"name": name, "bytes": len(data), "sha256": digest}]
    api.answers["GET /v1/jobs/job_01"] = (200, make_job(result_files=files, status="completed"))
    where = {"Location": f"{api.url}/storage?X-Amz-Signature=s3cret"}
    api.answers[f"GET /v1/jobs/job_01/artifacts/{name}"] = (302, b"", where)
    api.answers["GET /storage"] = (200, data)


def test_get_downloads_and_prints_only_paths(stoker, api, make_job, tmp_path):
    result(api, make_job)
    ran = stoker("get", "job_01", "-o", "to/here")
    target = tmp_path / "to" / "here" / "lora.safetensors"
    assert ran.out.split() == [str(target)]
    assert target.read_bytes() == b"weights"


def test_a_file_that_arrives_damaged_is_not_kept(stoker, api, make_job, tmp_path):
    result(api, make_job, sha256="00" * 32)
    ran = stoker("get", "job_01")
    assert ran.code == Exit.FAILED
    assert "damaged" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_shows_no_presigned_address(stoker, api, make_job, tmp_path):
    result(api, make_job)
    api.answers["GET /storage"] = (403, b"no")
    ran = stoker("get", "job_01")
    assert ran.code == Exit.FAILED
    assert "403" in ran.err
    assert "s3cret" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_server_cannot_have_files_written_elsewhere(stoker, api, make_job, tmp_path):
    result(api, make_job, name="../../outside")
    ran = stoker("get", "job_01", "-o", "folder")
    assert ran.code == Exit.FAILED
    assert not (tmp_path.parent / "outside").exists()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.png", "a.txt", "notes.doc"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_dry_run_asks_nobody(stoker, photos):
    ran = stoker("train", str(photos), "--base", "civitai:1", "--dry-run", "--json")
    assert ran.code == 0
    plan = json.loads(ran.out)
    assert len(plan["photographs"]) == 3
    assert plan["job"]["recipe"]["steps"] == 1000
    assert "$5.00" in ran.err


def test_nothing_is_spent_without_a_word(stoker, api, photos, monkeypatch):
    monkeypatch.setenv("STOKER_API_KEY", "stk_live_of_a_live_key")
    ran = stoker("train", str(photos), "--base", "civitai:1")
    assert ran.code == Exit.USAGE
    assert "-y" in ran.err
    assert "nothing is rented or spent" not in ran.err
    assert api.asked == []


@pytest.mark.parametrize("recipe", ["{", "[]", '{"nope": 1}', '{"rank": 0}', '{"steps": -1}'])
def test_a_wrong_recipe_is_refused_before_anything_is_uploaded(stoker, api, photos, recipe):
    ran = stoker("train", str(photos), "--base", "civitai:1", "--recipe", recipe, "-y")
    assert ran.code == Exit.USAGE
    assert api.asked == []


def test_a_folder_without_photographs_is_refused(stoker, tmp_path):
    assert stoker("train", str(tmp_path), "--base", "x", "-y").code == Exit.USAGE
    assert stoker("train", str(tmp_path / "none"), "--base", "x", "-y").code == Exit.USAGE


@pytest.fixture
def taking(api, make_job):
    """An API that takes photographs and a job."""
    uploads = [{"url": f"{api.url}/put/{index}", "headers": {}} for index in range(3)]
    api.answers |= {
        "POST /v1/datasets": (201, {"id": "ds_1", "uploads": uploads}),
        "POST /v1/datasets/ds_1/seal": (202, {"id": "ds_1"}),
        "POST /v1/jobs": (202, make_job(status="pending", webhook_secret="whsec_once")),
        **{f"PUT /put/{index}": (200, b"") for index in range(3)},
    }
    return api


def test_a_detached_training_leaves_its_id_on_stdout(stoker, taking, photos):
    ran = stoker("train", str(photos), "--base", "civitai:1", "-y", "--detach")
    assert ran.code == 0
    assert ran.out == "job_01\n"
    assert "whsec_once" in ran.err
    order = json.loads(taking.bodies[-1])
    assert order["dataset_id"] == "ds_1"
    assert order["max_cost"] == 5_000_000


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("completed", None, Exit.OK),
        ("failed", {"code": "trainer.oom", "message": "out of memory"}, Exit.JOB_ENDED_BADLY),
        ("failed", {"code": "budget.job", "message": "used up"}, Exit.OVER_BUDGET),
        ("cancelled", None, Exit.JOB_ENDED_BADLY),
    ],
)
def test_how_a_followed_job_ended_is_the_exit_code(
    stoker, taking, photos, make_job, status, reason, code
):
    taking.answers["GET /v1/jobs/job_01"] = (200, make_job(status=status, reason=reason))
    words = ("train", str(photos), "--base", "civitai:1", "-y")
    ran = stoker(*words)
    assert ran.code == code
    assert reason is None or reason["message"] in ran.err
    asked_for_json = stoker(*words, "--json")
    assert asked_for_json.code == code
    assert json.loads(asked_for_json.out)["status"] == status


def test_an_upload_that_the_storage_refuses_ends_it(stoker, taking, photos):
    taking.answers["PUT /put/1"] = (403, b"SignatureDoesNotMatch")
    ran = stoker("train", str(photos), "--base", "civitai:1", "-y")
    assert ran.code == Exit.FAILED
    assert "was not uploaded" in ran.err
    assert "POST /v1/jobs" not in taking.asked


def test_up_wants_the_key_before_it_starts_anything(stoker, tmp_path):
    ran = stoker("up")
    assert ran.code == Exit.USAGE
    assert "VAST_API_KEY is not set" in ran.err
    assert "sandbox serve" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named(stoker, api, monkeypatch):
    monkeypatch.setenv("VAST_API_KEY", "k")
    bind = api.url.removeprefix("http://")
    for words in (("up", "--bind", bind), ("sandbox", "serve", "--port", bind.split(":")[1])):
        ran = stoker(*words)
        assert ran.code == Exit.FAILED
        assert "is taken" in ran.err


@pytest.mark.parametrize("bind", ["nonsense", "host:", "host:99999", "host:-1"])
def test_an_address_that_is_none_is_refused(stoker, monkeypatch, bind):
    monkeypatch.setenv("VAST_API_KEY", "k")
    assert stoker("up", "--bind", bind).code == Exit.USAGE


@pytest.mark.parametrize("words", [("serve",), ("worker",), ("beat",), ("keys", "ls")])
def test_what_needs_a_database_says_so(stoker, words):
    ran = stoker(*words)
    assert ran.code == Exit.USAGE
    assert "DATABASE_URL is not set" in ran.err


def test_a_wrong_setting_is_named(stoker, monkeypatch):
    monkeypatch.setenv("STOKER_LEASE_HOURS", "long")
    ran = stoker("doctor")
    assert ran.code == Exit.USAGE
    assert "STOKER_LEASE_HOURS" in ran.err


def test_a_database_of_another_kind_is_refused(stoker, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "mysql://root:hunter2@host/db")
    ran = stoker("db", "upgrade")
    assert ran.code == Exit.USAGE
    assert "hunter2" not in ran.err


def test_the_doctor_of_nothing_has_a_mend_on_each_line_and_no_secret(stoker, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:9/x")
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:9/0")
    monkeypatch.setenv("STOKER_SECRET_KEYS", "WA9ozZ9wCd5Ic2mMy2uEyFnZdVJLFMz2jjcr4rHSNEE=")
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("VAST_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VAST_API_KEY", "hunter2")
    monkeypatch.setenv("STOKER_PUBLIC_URL", "http://127.0.0.1:9")
    ran = stoker("doctor")
    assert ran.code == Exit.DOCTOR
    lines = ran.out.splitlines()
    red = [line for line in lines if line.startswith("✘")]
    assert {line.split()[1] for line in red} == {"database", "redis", "vast", "s3", "public"}
    assert all("; mend: " in line for line in red)
    assert "hunter2" not in ran.out + ran.err


def test_a_fresh_key_for_secrets_is_all_that_is_printed(stoker):
    ran = stoker("keys", "secret")
    assert len(ran.out.strip()) == 44
    assert ran.err == ""


@pytest.mark.parametrize("text", ["{", "{}", '[{"op": "x", "kind": "drop"}]', '[{"no": 1}]'])
def test_faults_that_cannot_be_read_stop_the_sandbox(stoker, tmp_path, text):
    (tmp_path / "faults.json").write_text(text)
    ran = stoker("sandbox", "serve", "--port", "0", "--faults", "faults.json")
    assert ran.code == Exit.USAGE
    assert "faults" in ran.err
