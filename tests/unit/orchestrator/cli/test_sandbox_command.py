"""`stoker sandbox serve`: what it refuses before it starts anything."""

from __future__ import annotations

import pytest

from orchestrator.cli.console import Exit

FIVE = [word for port in range(5) for word in ("--notify", f"http://127.0.0.1:{port + 9000}/")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "heaven"], "calm, market, hell"),
        (["--notify", "ftp://here"], "'ftp://here' cannot be told"),
        (FIVE, "Vast has 4 at most"),
        (["--admin-bind", "nonsense"], "no address"),
        (["--time-scale", "0"], "0.001"),
    ],
)
def test_a_wrong_option_is_named(stoker, words, said):
    ran = stoker("sandbox", "serve", "--port", "0", *words)
    assert ran.code == Exit.USAGE
    assert said in ran.err


def test_a_fault_that_cannot_be_read_is_named_by_its_entry(stoker, tmp_path):
    (tmp_path / "faults.json").write_text('[{"kind": "vanish"}, {"kind": "vanish", "when": 5}]')
    ran = stoker("sandbox", "serve", "--port", "0", "--faults", "faults.json")
    assert ran.code == Exit.USAGE
    assert "entry 2" in ran.err
    assert "has no when" in ran.err
    assert "docs/sandbox.md" in ran.err


def test_a_taken_port_of_the_admin_page_is_named(stoker, api):
    ran = stoker("sandbox", "serve", "--port", "0", "--admin-bind", api.url.split("//")[1])
    assert ran.code == Exit.FAILED
    assert "is taken" in ran.err
