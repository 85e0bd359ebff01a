"""What each image is called: by a text file beside it, by `metadata.jsonl`, or by a template.

`NAME.txt` belongs to the image of that name. `metadata.jsonl` is that of Hugging Face's image
folders: a line ``{"file_name": "a.jpg", "text": "a dog"}`` per image, paths counting from its own
folder. Where both are there, the text file wins. `{trigger}` is replaced in all of them.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe

METADATA = "metadata.jsonl"


class Captions:
    """The captions that were written in a dataset.

    Args:
        files: all files of the dataset.

    Raises:
        DatasetError: `dataset.caption`, naming the file that cannot be understood.
    """

    def __init__(self, files: Iterable[Path], recipe: Recipe) -> None:
        self._trigger = recipe.trigger
        #: By the image's path without suffix, and by the image's whole path.
        self._beside: dict[str, Path] = {}
        self._listed: dict[str, str] = {}
        for file in files:
            if file.name.lower() == METADATA:
                self._listed |= _read_metadata(file)
            elif file.suffix.lower() == ".txt":
                self._beside[_name(file.with_suffix(""))] = file

    def of(self, image: Path) -> str:
        """As it was written, in one line; empty where nothing was."""
        file = self._beside.get(_name(image.with_suffix("")))
        written = _words(_text(file)) if file else ""
        written = written or _words(self._listed.get(_name(image), ""))
        return written.replace("{trigger}", self._trigger)

    def without_image(self, images: Iterable[Path]) -> list[str]:
        """What is captioned, but not there: names of text files, and of listed images."""
        paths = list(images)
        stems = {_name(path.with_suffix("")) for path in paths}
        names = {_name(path) for path in paths}
        lost = [file.name for stem, file in self._beside.items() if stem not in stems]
        return lost + [Path(name).name for name in self._listed if name not in names]


def template(recipe: Recipe) -> str:
    """What an image without a caption is called."""
    return recipe.caption_template.replace("{trigger}", recipe.trigger).strip()


def _read_metadata(file: Path) -> Mapping[str, str]:
    listed = {}
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise DatasetError(
                "dataset.caption",
                f'{file.name}, line {number}: wanted is {{"file_name": "…", "text": "…"}}',
            )
        listed[_name(file.parent / name)] = text
    return listed


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetError("dataset.caption", f"{file.name} is not UTF-8 text") from None


def _words(text: str) -> str:
    return " ".join(text.split())


def _name(path: Path) -> str:
    # macOS takes an é apart into e and accent where others do not
    return unicodedata.normalize("NFC", str(path))
