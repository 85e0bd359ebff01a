"""The sandbox as a server: the market's REST and Civitai on one port, time ticking behind."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from infra.sandbox.admin import create_admin_app
from infra.sandbox.civitai import Shelf, civitai_blueprint
from infra.sandbox.faults import Fault, Faults, HostFault, any_trouble, profile
from infra.sandbox.hosts import Host
from infra.sandbox.machines import STOP_GRACE_S, LocalMachines
from infra.sandbox.market import Market
from infra.sandbox.notify import Notifier
from infra.sandbox.spoil import FaultLayer, LimitLayer
from infra.sandbox.vast import vast_blueprint

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

#: Real seconds between two looks at what is due.
TICK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A running sandbox."""

    url: str
    market: Market
    faults: Faults
    #: Of the admin page; empty without one.
    admin_url: str = ""


class _OneSlash:
    """Vast takes `//api/...` (a server address with a trailing slash) as it is."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        environ["PATH_INFO"] = "/" + environ.get("PATH_INFO", "").lstrip("/")
        return self._app(environ, start_response)


class _Handler(WSGIRequestHandler):
    """Keeps connections, and its lines out of stderr."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        log.debug(message, *args)


def create_sandbox_app(
    market: Market,
    *,
    account_key: str,
    base_model_dir: Path | None = None,
    civitai_key: str = "",
    rate_limits: bool = False,
) -> Flask:
    """Vast's REST over `market`, with the market's faults; Civitai's too where there is a
    `base_model_dir`. With `rate_limits` calls are refused as Vast does."""
    app = Flask("stoker-sandbox", static_folder=None)
    app.url_map.strict_slashes = False
    app.register_blueprint(vast_blueprint(market, account_key))
    if base_model_dir is not None:
        app.register_blueprint(civitai_blueprint(Shelf(base_model_dir), civitai_key))
    layered: WSGIApplication = FaultLayer(app.wsgi_app, market, market.faults)
    if rate_limits:
        layered = LimitLayer(layered, market.now)
    app.wsgi_app = _OneSlash(layered)  # type: ignore[method-assign] # Flask's own way to wrap
    return app


@contextlib.contextmanager
def running_sandbox(
    *,
    account_key: str = "sandbox-account-key",
    civitai_key: str = "sandbox-civitai-key",
    base_model_dir: Path | None = None,
    data_dir: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    time_scale: float = 1.0,
    seed: int = 0,
    hosts: Sequence[Host] | None = None,
    boot_s: float | None = None,
    credit: float = 100.0,
    keep_logs: bool = False,
    faults: Sequence[Fault | HostFault] = (),
    fault_rate: float = 0.0,
    market_profile: str = "calm",
    rate_limits: bool = False,
    charges_lag_s: float = 0.0,
    notify: Sequence[str] = (),
    notify_secret: str = "",
    admin: tuple[str, int] | None = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[Sandbox]:
    """A sandbox on a port of its own (0: any free one), until the block ends; its machines end
    with it. Without `data_dir` their directories are temporary.

    Args:
        time_scale: market seconds per real second.
        hosts: what is for rent; None takes the market of `seed`.
        boot_s: market seconds from rented to running; None takes each host's own 20-90 s.
        credit: US dollars on the account.
        keep_logs: leave what machines printed below `data_dir/logs` after they are destroyed.
        faults: what goes wrong with which calls and hosts.
        fault_rate: chance per call and notification of some other trouble, drawn by `seed`.
        market_profile: the rates of faults besides: `calm` (none), `market` or `hell`.
        rate_limits: refuse calls that come faster than Vast documents.
        charges_lag_s: market seconds by which the list of charges is late.
        notify: up to four addresses that hear of events, signed with `notify_secret`.
        admin: host and port of the admin page.
        clock: real epoch seconds.
    """
    with contextlib.ExitStack() as stack:
        if data_dir is None:
            data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
        plan = Faults([*faults, *profile(market_profile), *any_trouble(fault_rate)], seed=seed)
        grace_s = STOP_GRACE_S / time_scale
        machines = LocalMachines(data_dir, keep_logs=keep_logs, grace_s=grace_s)
        notifier = Notifier(
            notify, notify_secret, rate=fault_rate, seed=seed, time_scale=time_scale, clock=clock
        )
        stack.callback(notifier.close)
        market = Market(
            machines,
            hosts=hosts,
            seed=seed,
            time_scale=time_scale,
            boot_s=boot_s,
            credit=credit,
            charges_lag_s=charges_lag_s,
            faults=plan,
            tell=notifier,
            clock=clock,
        )
        stack.callback(market.close)
        app = create_sandbox_app(
            market,
            account_key=account_key,
            base_model_dir=base_model_dir,
            civitai_key=civitai_key,
            rate_limits=rate_limits,
        )
        market.url = stack.enter_context(_serving(app, host, port))
        admin_url = ""
        if admin is not None:
            page = create_admin_app(market, notifier)
            admin_url = stack.enter_context(_serving(page, *admin))
        over = threading.Event()
        ticking = threading.Thread(target=_tick, args=(market, over), daemon=True)
        ticking.start()
        stack.callback(ticking.join)
        stack.callback(over.set)
        yield Sandbox(url=market.url, market=market, faults=plan, admin_url=admin_url)


@contextlib.contextmanager
def _serving(app: Flask, host: str, port: int) -> Iterator[str]:
    """Serve `app` while the block runs; its address."""
    server = make_server(host, port, app, threaded=True, request_handler=_Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _tick(market: Market, over: threading.Event) -> None:
    while not over.wait(TICK_S):
        try:
            market.tick()
        except Exception:  # the market must go on; the trace says what broke
            log.exception("the sandbox's clock stumbled")
