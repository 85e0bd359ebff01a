"""The tokenizer that goes with a text encoder.

A single file does not carry one. CLIP's vocabulary is 512 byte tokens, one token per merge, and
two special tokens. So its 49,408 embeddings mean 48,894 merges, and 514 embeddings mean a CLIP
tokenizer without merges, which needs no file at all (the tiny base has that one). The real merges
(`openai/clip-vit-large-patch14`, 1.5 MB) come from a `tokenizer` folder beside the model, else
from the Hugging Face hub or its cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_agent.lora.errors import ModelError

#: Embeddings of a CLIP text encoder whose tokenizer has no merges.
BYTE_WORDS = 514
CLIP_WORDS = 49_408
_CLIP_REPO = "openai/clip-vit-large-patch14"
#: What fills up short texts: for OpenAI's CLIP as Hugging Face has it, and for OpenCLIP (its 0).
HUGGING_FACE_PAD = "<|endoftext|>"
OPEN_CLIP_PAD = "!"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def clip_reads(tokenizer: Any) -> tuple[Any, int]:
    """See `Model.reads`; the beginning and the end of a text are tokens too."""
    return tokenizer, tokenizer.model_max_length - 2


def byte_vocabulary() -> dict[str, int]:
    """The first 512 tokens of CLIP's vocabulary and its two special ones, numbered."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *_SPECIAL]
    return {word: number for number, word in enumerate(words)}


def tokenizer_for(
    words: int,
    length: int,
    beside: Path,
    *,
    folder: str = "tokenizer",
    pad: str = HUGGING_FACE_PAD,
) -> Any:
    """A `CLIPTokenizer` for a text encoder with `words` embeddings and `length` positions.

    Args:
        beside: the model's folder, or the folder that its single file is in.
        folder: in it, where the tokenizer may be.
        pad: the token that short texts are filled up with.

    Raises:
        ModelError: no tokenizer for that many words can be had here.
    """
    from transformers import CLIPTokenizer

    said = {"model_max_length": length, "pad_token": pad}
    if words == BYTE_WORDS:
        return CLIPTokenizer(vocab=byte_vocabulary(), merges=[], **said)
    near = beside / folder
    if (near / "merges.txt").is_file() or (near / "tokenizer.json").is_file():
        return CLIPTokenizer.from_pretrained(near, local_files_only=True, **said)
    if words != CLIP_WORDS:
        raise ModelError(
            "model.tokenizer",
            f"the text encoder knows {words} words, which is not CLIP's vocabulary; "
            f"put its tokenizer into a folder named {folder} beside the model",
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(_CLIP_REPO, **said)
        # transformers makes one without words where it finds no file
        if len(tokenizer) != words:
            raise OSError("no words are there")
        return tokenizer
    except (OSError, ValueError) as error:
        raise ModelError(
            "model.tokenizer",
            f"CLIP's tokenizer ({_CLIP_REPO}) can be had neither from the Hugging Face hub nor "
            f"from {near}: {error}",
            retryable=True,
        ) from error
