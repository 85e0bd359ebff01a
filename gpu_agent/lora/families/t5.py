"""T5's encoder and its tokenizer, by which SD3 and FLUX.1 read long texts.

The real one is T5 v1.1 XXL: 4.8 billion weights, 9.5 GB in half precision. It is never run in
fp16, whose range its activations leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from gpu_agent.lora.families.single_file import T5, Source, filled

_TIED = "encoder.embed_tokens.weight"


def precision(dtype: Any) -> Any:
    """What T5 is loaded in where the denoiser is loaded in `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def tokenizer(source: Source, component: str) -> Any:
    """Raises: ModelError, where it can be had nowhere."""
    return source.words(T5TokenizerFast, component)


def encoder(source: Source, component: str, dtype: Any) -> Any:
    """The encoder, on the CPU.

    Raises:
        ModelError: it can be had nowhere, or weights are missing.
    """
    part = source.part(T5)
    if part is None:
        return source.encoder(T5EncoderModel, component, precision(dtype))
    words, width = part.shapes["shared.weight"]
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = part.shapes[f"{first}.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=part.shapes[f"{first}.q.weight"][0] // heads,
        d_ff=part.shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=part.count("encoder.block.{}."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )

    def read(name: str, shape: tuple[int, ...]) -> Any:
        # files have either of the two names of the one embedding, or both
        return part.tensor("shared.weight" if name == _TIED else name)

    made = filled(lambda: T5EncoderModel(config), read, torch.device("cpu"), precision(dtype))
    made.tie_weights()
    return made


def encode(t5: Any, words_of: Any, texts: Sequence[str], length: int, device: Any) -> Any:
    """Texts → (n, length, width). Padding is not masked: that is how both families were trained."""
    words = words_of(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return t5(words.to(device))[0]
