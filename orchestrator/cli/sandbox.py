"""`stoker sandbox`: a Vast.ai of local processes, with faults by script and by seed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from infra.sandbox.faults import PROFILES, Fault, HostFault, read_faults
from infra.sandbox.notify import MAX_URLS
from orchestrator.cli.console import CliError, Exit, err
from orchestrator.cli.processes import address, check_free, until_signal


def register(app: typer.Typer) -> None:
    words = "A Vast.ai of local processes, to rehearse on."
    group = typer.Typer(help=words, no_args_is_help=True)
    group.callback()(lambda: None)  # else typer makes the only command the group itself
    group.command()(serve)
    app.add_typer(group, name="sandbox")


def serve(
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8410,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    admin_bind: Annotated[
        str, typer.Option(help="HOST:PORT of the admin page; default: 127.0.0.1, the port above.")
    ] = "",
    base_models: Annotated[
        Path | None,
        typer.Option(help="Files for its Civitai, and an index.json: {version: file}."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Machines' directories; else temporary.")
    ] = None,
    time_scale: Annotated[float, typer.Option(min=0.001, help="Market seconds per second.")] = 1.0,
    boot: Annotated[float | None, typer.Option(help="Market seconds to boot a machine.")] = None,
    credit: Annotated[float, typer.Option(help="Dollars on the account.")] = 100.0,
    seed: Annotated[int, typer.Option(help="Of the market's offers and of its faults.")] = 0,
    faults: Annotated[
        Path | None, typer.Option(help="JSON file: what goes wrong with which calls and hosts.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help=f"Rates of faults besides: {', '.join(PROFILES)}.")
    ] = "calm",
    fault_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Chance per call of some trouble.")
    ] = 0.0,
    rate_limits: Annotated[
        bool, typer.Option("--rate-limits", help="Refuse calls as Vast does.")
    ] = False,
    charges_lag: Annotated[
        float, typer.Option(min=0, help="Market seconds by which the list of charges is late.")
    ] = 0.0,
    notify: Annotated[
        list[str] | None, typer.Option(help=f"URL that hears of events; up to {MAX_URLS} times.")
    ] = None,
    notify_secret: Annotated[
        str,
        typer.Option(envvar="SANDBOX_NOTIFY_SECRET", help="Signs them; else a fresh one."),
    ] = "",
    keep_logs: Annotated[
        bool, typer.Option("--keep-logs", help="Keep what machines printed.")
    ] = False,
) -> None:
    """Run a Vast.ai sandbox: its API for real, its machines local processes, nothing is spent.

    It prints what to set for `stoker up`. SANDBOX_ACCOUNT_KEY and SANDBOX_CIVITAI_KEY choose the
    keys; else they are fresh. What can go wrong is in docs/sandbox.md.

    Example: stoker sandbox serve --port 8410 --profile market --seed 7
    """
    from infra.sandbox.server import running_sandbox  # Flask: slow to import, and only needed here

    plan = _plan(base_models, faults, profile, notify or [])
    admin = address(admin_bind or f"127.0.0.1:{port and port + 1}")
    for where, option in (((host, port), "--port 0"), (admin, "--admin-bind 127.0.0.1:0")):
        if where[1]:
            check_free(*where, f"end it, or take a free one with {option}")
    keys = {
        name: os.environ.get(name) or secrets.token_hex(16)
        for name in ("SANDBOX_ACCOUNT_KEY", "SANDBOX_CIVITAI_KEY")
    }
    signing = notify_secret or secrets.token_hex(16)
    over = until_signal()
    with running_sandbox(
        account_key=keys["SANDBOX_ACCOUNT_KEY"],
        civitai_key=keys["SANDBOX_CIVITAI_KEY"],
        base_model_dir=base_models,
        data_dir=data,
        host=host,
        port=port,
        time_scale=time_scale,
        boot_s=boot,
        credit=credit,
        seed=seed,
        faults=plan,
        market_profile=profile,
        fault_rate=fault_rate,
        rate_limits=rate_limits,
        charges_lag_s=charges_lag,
        notify=notify or [],
        notify_secret=signing,
        admin=admin,
        keep_logs=keep_logs,
    ) as sandbox:
        said = {"VAST_URL": sandbox.url, "VAST_API_KEY": keys["SANDBOX_ACCOUNT_KEY"]}
        if base_models:
            said["CIVITAI_URL"] = sandbox.url
            said["CIVITAI_API_KEY"] = keys["SANDBOX_CIVITAI_KEY"]
            said["STOKER_PRIVATE_BASES"] = "1"
        if not rate_limits:
            said["STOKER_VAST_PACE"] = "0"
        if notify and not notify_secret:
            said["SANDBOX_NOTIFY_SECRET"] = signing
        for name, value in said.items():
            print(f"{name}={value}", flush=True)
        err.print(f"the admin page is at {sandbox.admin_url}", markup=False)
        err.print("the sandbox runs; Ctrl-C ends it and its machines", markup=False)
        over.wait()


def _plan(
    base_models: Path | None, faults: Path | None, profile: str, notify: list[str]
) -> list[Fault | HostFault]:
    """The faults to play, once everything was looked at. Raises: CliError."""
    if base_models and not (base_models / "index.json").is_file():
        raise CliError(
            f"{base_models} is no folder of base models",
            "it has no index.json",
            'write one, such as {"1": "base.safetensors"}',
            Exit.USAGE,
        )
    if profile not in PROFILES:
        raise CliError(
            f"no such profile: {profile}", "", f"known are {', '.join(PROFILES)}", Exit.USAGE
        )
    if len(notify) > MAX_URLS:
        raise CliError(
            f"{len(notify)} times --notify", f"Vast has {MAX_URLS} at most", "", Exit.USAGE
        )
    for url in notify:
        if not url.startswith(("http://", "https://")):
            raise CliError(f"{url!r} cannot be told", "it is no http address", "", Exit.USAGE)
    try:
        return read_faults(faults.read_text()) if faults else []
    except ValueError as error:
        what = f"{faults} cannot be read as faults"
        raise CliError(what, str(error), "docs/sandbox.md has examples", Exit.USAGE) from None
