"""The command line: `stoker …`."""

from __future__ import annotations


def main() -> None:
    """Run the command that the arguments name."""
    from orchestrator.cli.app import run

    run()
