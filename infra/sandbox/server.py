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

from infra.sandbox.civitai import Shelf, civitai_blueprint
from infra.sandbox.faults import Fault, FaultLayer, LimitLayer
from infra.sandbox.hosts import Host
from infra.sandbox.machines import LocalMachines
from infra.sandbox.market import Market
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
    faults: Sequence[Fault] = (),
    fault_rate: float = 0.0,
    seed: int = 0,
    rate_limits: bool = False,
) -> Flask:
    """Vast's REST over `market`; Civitai's too where there is a `base_model_dir`. For `faults`,
    `fault_rate`, `seed` and `rate_limits` see `running_sandbox`."""
    app = Flask("stoker-sandbox", static_folder=None)
    app.url_map.strict_slashes = False
    app.register_blueprint(vast_blueprint(market, account_key))
    if base_model_dir is not None:
        app.register_blueprint(civitai_blueprint(Shelf(base_model_dir), civitai_key))
    layered: WSGIApplication = app.wsgi_app
    if faults or fault_rate:
        layered = FaultLayer(layered, faults, rate=fault_rate, seed=seed)
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
    faults: Sequence[Fault] = (),
    fault_rate: float = 0.0,
    rate_limits: bool = False,
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
        faults: what goes wrong with which calls.
        fault_rate: chance per call of some other trouble, drawn by `seed`.
        rate_limits: refuse calls that come faster than Vast documents.
        clock: real epoch seconds.
    """
    with contextlib.ExitStack() as stack:
        if data_dir is None:
            data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
        machines = LocalMachines(data_dir, keep_logs=keep_logs)
        market = Market(
            machines,
            hosts=hosts,
            seed=seed,
            time_scale=time_scale,
            boot_s=boot_s,
            credit=credit,
            clock=clock,
        )
        stack.callback(market.close)
        app = create_sandbox_app(
            market,
            account_key=account_key,
            base_model_dir=base_model_dir,
            civitai_key=civitai_key,
            faults=faults,
            fault_rate=fault_rate,
            seed=seed,
            rate_limits=rate_limits,
        )
        server = make_server(host, port, app, threaded=True, request_handler=_Handler)
        stack.callback(server.server_close)
        market.url = f"http://{host}:{server.server_port}"
        over = threading.Event()
        ticking = threading.Thread(target=_tick, args=(market, over), daemon=True)
        serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        for thread in (ticking, serving):
            thread.start()
        stack.callback(_end, over, server.shutdown, ticking, serving)
        yield Sandbox(url=market.url, market=market)


def _end(over: threading.Event, shutdown: Any, *threads: threading.Thread) -> None:
    over.set()
    shutdown()
    for thread in threads:
        thread.join()


def _tick(market: Market, over: threading.Event) -> None:
    while not over.wait(TICK_S):
        try:
            market.tick()
        except Exception:  # the market must go on; the trace says what broke
            log.exception("the sandbox's clock stumbled")
