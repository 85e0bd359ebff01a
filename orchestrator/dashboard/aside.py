"""A looker in a process of its own: `python -m orchestrator.dashboard.aside MODULE:FACTORY`.

Python runs one thread at a time, and a look at hundreds of jobs would hold up every report that
the same process takes. Beside it the look costs only what the machine has left: the process is a
nice one. It starts with the first open page and ends with its parent.

One JSON line asks, one answers; stdin's end is the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any

from infra import logs
from orchestrator.api.problems import is_outage
from orchestrator.dashboard.live import LocalLooker, Page
from state.errors import NotFound, StoreUnavailable
from state.store import Transaction

#: How much a look gives way to reports.
NICENESS = 10
#: Each process counts for itself; this one answers nobody.
NOT_HANDED_DOWN = "PROMETHEUS_MULTIPROC_DIR"
_log = logs.logger(__name__)


class Aside:
    """The looker of the application that `factory` (`module:name`) makes, in another process.

    When that process is gone, the next look starts another one, which knows no earlier look.
    """

    def __init__(self, factory: str) -> None:
        self._factory = factory
        self._process: subprocess.Popen[str] | None = None
        self._one = threading.Lock()
        self._closed = False

    def look(self, tx: Transaction, page: Page) -> int:
        return int(self._ask("look", page.name, page.what))

    def fragments(self, tx: Transaction, page: Page, before: int | None, after: int) -> str:
        return str(self._ask("fragments", page.name, page.what, before, after))

    def close(self) -> None:
        """End the process, and look no more. A look that is under way ends as in an outage."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # so that nobody waits for an answer, with the lock
        with self._one:
            self._end()

    def _ask(self, *asked: Any) -> Any:
        """Raises: StoreUnavailable, NotFound; RuntimeError for any other fault there."""
        with self._one:
            process = self._started()
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the looker has no pipes")
            try:
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            if not answer:
                self._end()
                raise StoreUnavailable("the process that looks at pages ended; it starts again")
        kind, value = json.loads(answer)
        if kind == "away":
            raise StoreUnavailable(value)
        if kind == "missing":
            raise NotFound(value)
        if kind == "fault":
            raise RuntimeError(value)
        return value

    def _started(self) -> subprocess.Popen[str]:
        if self._closed:
            raise StoreUnavailable("this process is about to end")
        if self._process is None or self._process.poll() is not None:
            env = {name: value for name, value in os.environ.items() if name != NOT_HANDED_DOWN}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.dashboard.aside", self._factory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                text=True,
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:
                self._process = None


def answers(looker: LocalLooker, asked: IO[str], told: IO[str]) -> None:
    """Answer every line of `asked` with one of `told`."""
    for line in asked:
        verb, name, what, *looks = json.loads(line)
        page = Page(name, what)
        answer: tuple[str, Any]
        try:
            with looker.deps.store.transaction() as tx:
                if verb == "look":
                    answer = ("ok", looker.look(tx, page))
                else:
                    answer = ("ok", looker.fragments(tx, page, *looks))
        except NotFound as error:
            answer = ("missing", str(error))
        except Exception as error:  # noqa: BLE001 -- the one who asked decides
            if is_outage(error):
                answer = ("away", str(error))
            else:
                _log.error("cannot look", page=str(page), exc_info=error)
                answer = ("fault", f"{type(error).__name__} in the process that looks; see its log")
        told.write(json.dumps(answer) + "\n")
        told.flush()


def main() -> None:
    # whatever else prints must not come between the answers
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent
    module, _, name = sys.argv[1].partition(":")
    app = getattr(importlib.import_module(module), name)()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)  # only now: somebody waits for its start
    answers(app.extensions["looker"], sys.stdin, told)


if __name__ == "__main__":
    main()
