"""Textual inversion (arXiv:2208.01618): a word's meaning, and nothing else, is trained.

The word stands for a few vectors among the text encoder's embeddings. All of the model is left as
it is, so the result is as small as a sentence and goes with any model of the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gpu_agent.lora.adapter import Trainable
from gpu_agent.lora.errors import DatasetError
from gpu_agent.lora.families.base import Conditions
from gpu_agent.lora.families.sd import UNetModel
from gpu_agent.recipe import Recipe

#: What AUTOMATIC1111's and ComfyUI's files call SDXL's two encoders, and what those of SD 1.x and
#: 2.x call their only one.
_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_ONLY = "emb_params"


class Inversion(Trainable):
    """The vectors of the recipe's trigger, (rank, width) for each text encoder.

    They begin as the trigger's own tokens, so that an untrained word means what it meant before.
    A vector never gets longer than the longest of the encoder's own: beyond it the word would
    drown the rest of its sentence.

    Raises:
        DatasetError: `dataset.caption`; the trigger is in none of the captions.
    """

    def __init__(self, model: UNetModel, recipe: Recipe, captions: Sequence[str]) -> None:
        self._model = model
        self._rate = recipe.learning_rate
        self._trigger = re.compile(rf"(?<!\w){re.escape(recipe.trigger)}(?!\w)", re.IGNORECASE)
        if not any(map(self._trigger.search, captions)):
            raise DatasetError(
                "dataset.caption",
                f"no caption has the word {recipe.trigger!r}, which is to be taught; "
                "write it, or {trigger}, where the captions speak of it",
            )
        tokens = [f"<vector-{number}>" for number in range(recipe.rank)]
        self._tokens = " ".join(tokens)
        encoders = model.text_encoders
        self._tables = {
            _SDXL[name] if len(encoders) > 1 else _ONLY: _extend(
                encoder, model.tokenizers[name], tokens, recipe.trigger
            )
            for name, encoder in encoders.items()
        }

    def named(self) -> Mapping[str, Any]:
        return {name: table.vectors for name, table in self._tables.items()}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.parameters, "rate": self._rate}]

    @property
    def trains_texts(self) -> bool:
        return True

    def encode(self, texts: Sequence[str]) -> Conditions:
        return self._model.encode_texts([self._trigger.sub(self._tokens, text) for text in texts])

    @torch.no_grad()
    def settle(self) -> None:
        for table in self._tables.values():
            lengths = table.vectors.norm(dim=1, keepdim=True)
            table.vectors.mul_((table.longest / lengths).clamp(max=1.0))


class _Table(nn.Module):
    """An embedding, and vectors of new words that are counted on from `first`."""

    def __init__(self, table: Any, vectors: Any, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.vectors = nn.Parameter(vectors)
        self.longest = table.weight.norm(dim=1).max()

    @property
    def weight(self) -> Any:
        return self.table.weight

    def forward(self, words: Any) -> Any:
        known = self.table(words.clamp(max=self.first - 1))
        new = nn.functional.embedding((words - self.first).clamp(min=0), self.vectors)
        return torch.where((words >= self.first)[..., None], new.to(known.dtype), known)


def _extend(encoder: Any, tokenizer: Any, tokens: list[str], trigger: str) -> _Table:
    old = encoder.get_input_embeddings()
    own = tokenizer(trigger, add_special_tokens=False).input_ids
    tokenizer.add_tokens(tokens)
    first = tokenizer.convert_tokens_to_ids(tokens[0])
    vectors = old.weight[torch.tensor([own[n % len(own)] for n in range(len(tokens))])]
    table = _Table(old, vectors.detach().float().clone(), first)
    encoder.set_input_embeddings(table)
    # published configurations say 2, for which the highest number counts as the end: now a new one
    inner = getattr(encoder, "text_model", encoder)
    inner.eos_token_id = tokenizer.eos_token_id
    return table
