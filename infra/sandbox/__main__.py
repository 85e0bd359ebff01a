"""`python -m infra.sandbox`: the sandbox until SIGINT or SIGTERM. Keys come from the
environment: SANDBOX_ACCOUNT_KEY, SANDBOX_CIVITAI_KEY."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from infra.sandbox.faults import PROFILES, read_faults
from infra.sandbox.server import running_sandbox


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.sandbox", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--data-dir", type=Path, help="machines' directories; default: temporary")
    parser.add_argument("--base-model-dir", type=Path, help="files for the Civitai sandbox")
    parser.add_argument("--time-scale", type=float, default=1.0, help="market seconds per second")
    parser.add_argument("--boot", type=float, help="market seconds that a machine needs to boot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--credit", type=float, default=100.0, help="US dollars")
    parser.add_argument("--keep-logs", action="store_true")
    parser.add_argument("--faults", type=Path, help="JSON file: what goes wrong")
    parser.add_argument("--profile", choices=PROFILES, default="calm", help="rates of faults")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="chance per call, by --seed")
    parser.add_argument("--rate-limits", action="store_true", help="refuse calls as Vast does")
    args = parser.parse_args()
    keys = [os.environ.get(name) for name in ("SANDBOX_ACCOUNT_KEY", "SANDBOX_CIVITAI_KEY")]
    if not keys[0]:
        parser.error("set SANDBOX_ACCOUNT_KEY to the key that the account shall have")
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with running_sandbox(
        account_key=keys[0],
        civitai_key=keys[1] or "",
        base_model_dir=args.base_model_dir,
        data_dir=args.data_dir,
        host=args.host,
        port=args.port,
        time_scale=args.time_scale,
        seed=args.seed,
        boot_s=args.boot,
        credit=args.credit,
        keep_logs=args.keep_logs,
        faults=read_faults(args.faults.read_text()) if args.faults else (),
        market_profile=args.profile,
        fault_rate=args.fault_rate,
        rate_limits=args.rate_limits,
    ) as sandbox:
        sys.stdout.write(f"sandbox ready at {sandbox.url}\n")
        sys.stdout.flush()
        over.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
