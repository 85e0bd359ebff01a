"""Base models of many files: which files of a repository make a diffusers folder, and what a
single file lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

#: What a diffusers folder begins with.
INDEXES = ("model_index.json", "modular_model_index.json")
#: Families whose single files often hold the denoiser alone.
OFTEN_PARTIAL = frozenset({"sd3", "flux", "lumina2", "hunyuanimage", "anima"})

_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors"})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_HALF = ".fp16.safetensors"
#: Weights in another precision or of another purpose than the plain ones beside them.
_VARIANT = re.compile(r"\.(fp16|bf16|fp8|non_ema|ema_only)\b")
#: Parts of tensor names in single files, by the folders that they stand for.
_HELD = {
    "text_encoder": ("text_encoders.", "cond_stage_model.", "conditioner.embedders."),
    "vae": ("first_stage_model.", "vae."),
}

Rows = Mapping[str, Mapping[str, Any]]


def folder_files(files: Iterable[str]) -> dict[str, str]:
    """Of a repository's files those that a diffusers model needs: its path here → its path there.

    Weights come once: at half precision where they exist so, for they are half the download.
    """
    names = [name for name in files if _NAME.fullmatch(name)]
    chosen = {name: name for name in files if name in INDEXES}
    for folder in sorted({name.partition("/")[0] for name in names}):
        inside = [name for name in names if name.startswith(folder + "/")]
        usable = [name for name in inside if PurePosixPath(name).suffix in _SUFFIXES]
        plain = [name for name in usable if not _VARIANT.search(name)]
        halves = [name for name in usable if name.endswith(_HALF)]
        if len(halves) == 1:
            plain = [name for name in plain if ".safetensors" not in name]
            chosen[halves[0].removesuffix(_HALF) + ".safetensors"] = halves[0]
        chosen |= {name: name for name in plain}
    return chosen


def lacking(tensors: Sequence[str], folders: Iterable[str]) -> set[str]:
    """Of a model's folders those that a single file with these tensors needs beside it."""
    held = {
        folder
        for folder, marks in _HELD.items()
        if any(name.startswith(mark) for name in tensors for mark in marks)
    }
    return {
        folder
        for folder in folders
        if "tokenizer" in folder
        or (folder == "vae" and "vae" not in held)
        or (folder.startswith("text_encoder") and "text_encoder" not in held)
    }
