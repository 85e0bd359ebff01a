"""The agent as one file, and the script that starts it on a rented machine."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Vast.ai takes no longer script (characters).
LONGEST_SCRIPT = 4048
#: Where a web process serves the bundle, below its public URL.
BUNDLE_PATH = "/agent/v1/gpu_agent.pyz"

_MAIN = b"import sys\n\nfrom gpu_agent.__main__ import main\n\nsys.exit(main())\n"
_LEFT_OUT = frozenset({"__pycache__", "pyproject.toml"})


@dataclass(frozen=True)
class Bundle:
    """A zipapp that `python3 gpu_agent.pyz` runs; `sha256` is lower-case hex."""

    bytes: bytes = field(repr=False)
    sha256: str


def build_bundle(package: Path | None = None) -> Bundle:
    """Pack the package `gpu_agent` (the installed one unless given), with all its files.

    The same files give the same bytes on every machine: sorted, undated, and stored as they are,
    because compressed bytes differ between versions of zlib. Web and worker processes on
    different machines must agree on the SHA-256.
    """
    root = package or _installed()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "__main__.py", _MAIN)
        for path in _files(root):
            _add(archive, f"gpu_agent/{path.relative_to(root).as_posix()}", path.read_bytes())
    content = packed.getvalue()
    return Bundle(content, hashlib.sha256(content).hexdigest())


def _installed() -> Path:
    spec = importlib.util.find_spec("gpu_agent")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package gpu_agent is not installed")
    return Path(spec.submodule_search_locations[0])


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*"), key=lambda item: item.relative_to(root).parts):
        if path.is_file() and not _LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)


def onstart_script(public_url: str, sha256: str) -> str:
    """The script that a new instance runs: fetch the bundle, compare its SHA-256, start it.

    The rest comes by the environment: STOKER_URL, STOKER_TOKEN, and what the market sets.

    Raises:
        ValueError: the URL cannot stand in the script, or makes it too long.
    """
    url = public_url.rstrip("/") + BUNDLE_PATH
    if not url.isprintable() or any(mark in url for mark in " '\"\\"):
        raise ValueError(f"{public_url!r} cannot be used in a shell script")
    template = (Path(__file__).parent / "docker" / "onstart.sh.tmpl").read_text()
    lines = template.splitlines()
    # comments are for readers of the template; every character counts on the way to the market
    kept = [line for line in lines[1:] if not line.startswith("#")]
    script = "\n".join([lines[0], *kept, ""]).replace("@URL@", url).replace("@SHA256@", sha256)
    if len(script) > LONGEST_SCRIPT:
        raise ValueError(f"the start script has {len(script)} characters, over {LONGEST_SCRIPT}")
    return script
