"""A stand-in for Redis, in Python: `python -P redisd.py CONFIG`.

For machines that have no Redis and no wheel with one. It keeps nothing on the disk, which loses
nothing: what goes through Redis are wake-ups, and the truth is in PostgreSQL. `CONFIG` is the
file that a Redis would read; its port is taken from it. The stand-in asks for no password.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(config: Path) -> None:
    from fakeredis import TcpFakeServer

    lines = (line.partition(" ") for line in config.read_text().splitlines())
    options = {name: value for name, _, value in lines}
    server = TcpFakeServer(("127.0.0.1", int(options["port"])), server_version=(7, 0))
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
