"""`python3 gpu_agent.pyz` on a rented machine. What it needs comes by the environment:

STOKER_URL, STOKER_TOKEN, CONTAINER_ID, CONTAINER_API_KEY; VAST_URL and STOKER_HOME if wanted.
"""

from __future__ import annotations

import hashlib
import logging
import logging.handlers
import os
import signal
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path

from gpu_agent.agent import Agent, Charge
from gpu_agent.clock import Clock
from gpu_agent.deadman import Instance
from gpu_agent.halt import Halt
from gpu_agent.journal import Journal

MARKET_URL = "https://console.vast.ai"
LOG_BYTES = 10 << 20


def charge_from(env: MutableMapping[str, str]) -> Charge:
    """Read the environment, and take the secrets out of it: no child is to inherit them.

    Raises:
        KeyError: STOKER_URL or STOKER_TOKEN is missing.
    """
    key = env.pop("CONTAINER_API_KEY", "")
    number = env.get("CONTAINER_ID", "")
    instance = Instance(id=number, api_key=key, market_url=env.get("VAST_URL") or MARKET_URL)
    url, token = env["STOKER_URL"], env.pop("STOKER_TOKEN")
    home = Path(env.get("STOKER_HOME") or Path.home() / "stoker")
    # a folder per token: what another attempt left on this machine is not ours
    own = home.absolute() / hashlib.sha256(token.encode()).hexdigest()[:16]
    return Charge(
        url=url,
        token=token,
        home=own,
        instance=instance if number and key else None,
        promise=home / "due",
    )


def _log_to(home: Path, journal: Journal) -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
        handlers=[
            logging.StreamHandler(),
            logging.handlers.RotatingFileHandler(
                home / "agent.log", maxBytes=LOG_BYTES, backupCount=1
            ),
            journal,
        ],
    )
    logging.raiseExceptions = False  # a full disk must not fill the console too
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it names addresses with signatures


def _end_on_signals(agent: Agent, halt: Halt) -> None:
    def told(number: int, frame: object) -> None:
        if halt.reason:
            os._exit(128 + number)  # over already, and still not gone
        # on a thread: the one that was interrupted may hold the lock of what we are to set
        threading.Thread(target=agent.terminate).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)


def main() -> int:
    try:
        charge = charge_from(os.environ)
    except KeyError as error:
        sys.stderr.write(f"stoker agent: {error} is not set\n")
        return 2
    charge.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    journal, halt = Journal(), Halt()
    _log_to(charge.home, journal)
    agent = Agent(charge, halt=halt, clock=Clock(), journal=journal)
    _end_on_signals(agent, halt)
    return agent.run()


if __name__ == "__main__":
    sys.exit(main())
