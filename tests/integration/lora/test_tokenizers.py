"""Where the words of a text encoder come from, and what happens where they cannot be had."""

import pytest
from huggingface_hub import constants
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5TokenizerFast

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import clip_words, single_file

KINDS = (CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5TokenizerFast)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_clips_words_are_refused_where_they_can_be_had_nowhere(tmp_path):
    with pytest.raises(ModelError) as raised:
        clip_words.tokenizer_for(clip_words.CLIP_WORDS, 77, tmp_path)
    assert raised.value.code == "model.tokenizer"
    assert raised.value.retryable


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_those_of_the_other_encoders(kind, tmp_path):
    (tmp_path / "words").mkdir()
    source = single_file.Source(tmp_path, "nobody/nothing")
    with pytest.raises(ModelError, match="no words are there") as raised:
        source.words(kind, "words")
    assert raised.value.code == "model.component"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_still_makes_a_tokenizer_of_nothing(kind, tmp_path):
    (tmp_path / "words").mkdir()
    tokenizer = kind.from_pretrained(tmp_path, subfolder="words", local_files_only=True)
    assert tokenizer("a cat").input_ids == tokenizer("a dog").input_ids
