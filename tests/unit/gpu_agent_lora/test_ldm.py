import json
import struct
from pathlib import Path

import pytest

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import clip_words, ldm

TEXT = ldm.SD1.encoders[0].prefix
SD15_WIDTHS = (320, 640, 1280, 1280)


def sd15_header():
    """The part of a real SD 1.5 file's header that says how wide its networks are."""
    shapes = {
        f"{ldm.UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{ldm.UNET}out.2.weight": (4, 320, 3, 3),
        f"{ldm.VAE}post_quant_conv.weight": (4, 4, 1, 1),
    }
    for level, width in enumerate(SD15_WIDTHS):
        for layer in range(2):
            block = f"{ldm.UNET}input_blocks.{3 * level + layer + 1}"
            shapes[f"{block}.0.in_layers.2.weight"] = (width, width, 3, 3)
            if level < 3:
                shapes[f"{block}.1.proj_in.weight"] = (width, width, 1, 1)
                attention = f"{block}.1.transformer_blocks.0.attn2.to_k.weight"
                shapes[attention] = (width, 768)
        if level < 3:
            shapes[f"{ldm.UNET}input_blocks.{3 * level + 3}.0.op.weight"] = (width, width, 3, 3)
    for level, width in enumerate((128, 256, 512, 512)):
        for layer in range(2):
            name = f"{ldm.VAE}encoder.down.{level}.block.{layer}.conv1.weight"
            shapes[name] = (width, width, 3, 3)
    text = f"{TEXT}text_model."
    shapes[f"{text}embeddings.token_embedding.weight"] = (49408, 768)
    shapes[f"{text}embeddings.position_embedding.weight"] = (77, 768)
    shapes[f"{text}embeddings.position_ids"] = (1, 77)
    for layer in range(12):
        shapes[f"{text}encoder.layers.{layer}.mlp.fc1.weight"] = (3072, 768)
    return ldm.Header(shapes, {})


def write(path: Path, entries: object, body: bytes = b"") -> Path:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return path


def test_a_real_sd15_file_gives_exactly_the_sd15_configuration():
    found = ldm.configs(sd15_header())
    for component in ("unet", "vae", "text_encoder"):
        assert found[component] == ldm.SD1.template(f"{component}/config.json")
    assert found["scheduler"] == ldm.SD1.template("scheduler/scheduler_config.json")


def test_a_file_that_predicts_velocity_says_so():
    header = sd15_header()
    marked = ldm.Header({**header.shapes, "v_pred": (0,)}, {})
    assert ldm.configs(marked)["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("modelspec.prediction_type", "v"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v"),
    ],
)
def test_a_file_whose_notes_speak_of_velocity_predicts_it(key, said):
    noted = ldm.Header(sd15_header().shapes, {key: said})
    assert ldm.configs(noted)["scheduler"]["prediction_type"] == "v_prediction"


def test_a_file_without_signal_at_the_last_level_is_sampled_from_there():
    header = sd15_header()
    marked = ldm.Header({**header.shapes, "v_pred": (0,), "ztsnr": (0,)}, {})
    scheduler = ldm.configs(marked)["scheduler"]
    assert scheduler["rescale_betas_zero_snr"]
    assert scheduler["timestep_spacing"] == "trailing"


def test_old_names_of_the_text_encoder_are_understood():
    header = sd15_header()
    old = {name.replace("text_model.", ""): shape for name, shape in header.shapes.items()}
    assert ldm.configs(ldm.Header(old, {})) == ldm.configs(header)


def without(part):
    kept = sd15_header().shapes.items()
    return ldm.Header({name: shape for name, shape in kept if part not in name}, {})


def changed(name, shape):
    return ldm.Header({**sd15_header().shapes, name: shape}, {})


@pytest.mark.parametrize(
    "header",
    [
        ldm.Header({}, {}),
        ldm.Header({f"{TEXT}text_model.embeddings.position_ids": (1, 77)}, {}),
        ldm.Header({"lora_unet_mid_block.alpha": ()}, {}),
        without("first_stage_model"),
        without("cond_stage_model"),
        without("diffusion_model"),
        changed(f"{ldm.UNET}input_blocks.0.0.weight", (320, 9, 3, 3)),
        changed(f"{ldm.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024)),
        changed(f"{TEXT}text_model.embeddings.token_embedding.weight", (49408,)),
    ],
)
def test_what_is_no_whole_sd1_model_is_refused(header):
    with pytest.raises(ModelError) as caught:
        ldm.configs(header)
    assert caught.value.code == "model.family"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "model.format"),
        (b"PK\x03\x04 a pickle of torch.save", "model.format"),
        (b"\x80\x02}q\x00." * 50, "model.format"),
        (struct.pack("<Q", 50) + b"{}", "model.truncated"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "model.format"),
        (struct.pack("<Q", 2) + b"[]", "model.format"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, code):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        ldm.read_header(tmp_path / "model.safetensors")
    assert caught.value.code == code


@pytest.mark.parametrize(
    "entry",
    [1, None, [], {}, {"shape": "ab", "data_offsets": [0, 4]}, {"shape": [1], "data_offsets": 4}],
)
def test_a_header_of_garbage_is_refused(tmp_path, entry):
    with pytest.raises(ModelError) as caught:
        ldm.read_header(write(tmp_path / "m.safetensors", {"a": entry}))
    assert caught.value.code == "model.format"


def test_a_download_that_stopped_early_may_be_tried_again(tmp_path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with pytest.raises(ModelError, match="of 8") as caught:
        ldm.read_header(write(tmp_path / "m.safetensors", {"a": entry}, b"\x00" * 15))
    assert caught.value.code == "model.truncated"
    assert caught.value.retryable


def test_the_vocabulary_without_merges_numbers_the_bytes_as_clip_does():
    words = clip_words.byte_vocabulary()
    assert len(words) == clip_words.BYTE_WORDS
    assert (words["!"], words["a"], words["!</w>"], words["<|endoftext|>"]) == (0, 64, 256, 513)
