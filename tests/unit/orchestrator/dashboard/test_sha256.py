"""Our own SHA-256, for browsers that have none without https and for files too large for theirs."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import orchestrator.dashboard

SCRIPT = Path(orchestrator.dashboard.__file__).parent / "static" / "sha256.js"
#: Hashes what it reads, cut into pieces of odd sizes.
PROGRAM = """
import { readFileSync } from "node:fs";
const source = readFileSync(process.argv[1], "utf8");
const { Sha256 } = await import("data:text/javascript," + encodeURIComponent(source));
const all = readFileSync(0);
const pieces = process.argv[2].split(",").map(Number);
let at = 0, said = [];
for (const length of pieces) {
  const hash = new Sha256();
  const one = all.subarray(at, at + length);
  for (let from = 0; from < one.length; from += 61) hash.update(one.subarray(from, from + 61));
  said.push(hash.hex());
  at += length;
}
console.log(said.join(" "));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_it_is_sha256_at_every_length_around_a_block() -> None:
    lengths = [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, 70_001]
    texts = [random.Random(length).randbytes(length) for length in lengths]
    ran = subprocess.run(
        ["node", "--input-type=module", "-e", PROGRAM, str(SCRIPT), ",".join(map(str, lengths))],
        input=b"".join(texts),
        capture_output=True,
        check=True,
    )
    assert ran.stdout.decode().split() == [hashlib.sha256(text).hexdigest() for text in texts]
