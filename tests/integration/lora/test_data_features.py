"""What the data side of a recipe does to a training, on the tiny base and real photographs."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_agent.lora import data
from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe

TINY = {"resolution": 64, "trigger": "sks"}


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """The tiny base, loaded."""
    import torch

    from gpu_agent.lora.families import family

    work = tmp_path_factory.mktemp("work")
    return family("sd1").load(base, work, Recipe(), torch.device("cpu"), torch.float32)


@pytest.fixture
def cache_of(model, tmp_path):
    """A cache for a recipe, in a folder that outlives it."""
    from gpu_agent.lora.cache import Cache

    return lambda **recipe: Cache(model, Recipe(**TINY, **recipe), tmp_path / "cache", "here")


def brought(photos, where):
    """A folder with two photographs and captions of several parts."""
    folder = where / "few"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        shutil.copy(photos / f"{name}.jpg", folder)
        (folder / f"{name}.txt").write_text(f"sks, {name}, on a table, in the sun, seen from above")
    return folder


@pytest.fixture
def few(photos, tmp_path):
    return brought(photos, tmp_path)


def pictures(folder, **recipe):
    return data.collect(folder, Recipe(**TINY, **recipe)).pictures


def result(heard):
    """The weights and the losses, as bytes."""
    files = {file["name"]: Path(file["path"]) for file in heard.one("completed")["files"]}
    return [files[name].read_bytes() for name in ("lora.safetensors", "loss_history.csv")]


# --- captions -------------------------------------------------------------------------------


def test_a_shuffled_caption_keeps_its_first_parts_and_loses_none():
    from gpu_agent.lora.cache import ORDERS, orders

    recipe = Recipe(**TINY, caption_shuffle=True, keep_tokens=2)
    caption = "sks, a dog, red, small, wet, asleep"
    said = orders(caption, recipe)
    assert said[0] == caption
    assert len(said) == len(set(said)) == ORDERS
    for text in said:
        assert text.startswith("sks, a dog, ")
        assert sorted(text.split(", ")) == sorted(caption.split(", "))
    assert orders(caption, recipe) == said
    assert orders("a, b, c, d", recipe) == ["a, b, c, d", "a, b, d, c"]
    assert orders(caption, Recipe(**TINY)) == [caption]
    assert orders("no comma", recipe) == ["no comma"]


def test_a_caption_that_is_longer_than_the_model_reads_is_told(cache_of, few):
    # the tiny base counts each letter
    (few / "chelsea.txt").write_text("sks " + "a" * 72)
    (few / "coffee.txt").write_text("sks " + "a" * 73)
    cache = cache_of()
    for picture in pictures(few):
        cache.sample(picture)
    assert cache.warnings == [
        "the caption of coffee.jpg is cut: of its 76 tokens the first 75 are read"
    ]


# --- masks ----------------------------------------------------------------------------------


def masked(folder, paint):
    """Give every photograph a mask."""
    for photo in list(folder.glob("*.jpg")):
        with Image.open(photo) as image:
            mask = Image.new("L", image.size, 0)
        paint(mask)
        mask.save(photo.with_suffix(".mask.png"))


def left_half(mask):
    mask.paste(255, (0, 0, mask.width // 2, mask.height))


def conditions_of(sample):
    return {name: tensor[None] for name, tensor in sample.conditions[0].items()}


def test_a_white_mask_is_no_mask_to_the_bit(cache_of, model, few):
    import torch

    (plain, *_) = pictures(few)
    masked(few, lambda mask: mask.paste(255, (0, 0, *mask.size)))
    (white, *_) = pictures(few, masked_loss=True)
    assert white.mask is not None
    without, with_mask = cache_of().sample(plain), cache_of(masked_loss=True).sample(white)
    assert without.mask is None
    latents = model.draw_latents(without.moments, torch.zeros_like(without.moments[:, :4]))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (
            model.losses(latents, noise, torch.tensor([0.5]), conditions_of(sample), sample.mask)
            for sample in (without, with_mask)
        )
    assert torch.equal(one, two)


def test_a_mask_is_mirrored_and_averaged_like_the_latents(cache_of, few):
    masked(few, left_half)
    recipe = {"masked_loss": True, "flip": True}
    picture = pictures(few, **recipe)[0]
    sample = cache_of(**recipe).sample(picture)
    width, height = (side // 8 for side in picture.bucket)
    assert sample.mask.shape == (2, 1, height, width)
    upright, mirrored = (np.asarray(view) for view in sample.mask[:, 0])
    assert (upright == mirrored[:, ::-1]).all()
    assert upright.mean() == pytest.approx(1.0)
    # white counts twice, for it is half of the image
    assert upright[:, 0] == pytest.approx(2.0, abs=0.3)
    assert (upright[:, -1] == 0).all()


def test_the_loss_is_that_of_the_white_part(cache_of, model, few):
    import torch

    masked(few, left_half)
    sample = cache_of(masked_loss=True).sample(pictures(few, masked_loss=True)[0])
    latents = model.draw_latents(sample.moments, torch.zeros_like(sample.moments[:, :4]))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.5])
    conditions = conditions_of(sample)
    with torch.no_grad():
        loss = model.losses(latents, noise, level, conditions, sample.mask)
        said = model.predict(model.objective.mix(latents, noise, level), level, conditions)
    # this base predicts the noise; the column in the middle may be grey
    white = sample.mask / sample.mask.max()
    squares = (said - noise).square() * white
    assert float(loss) == pytest.approx(float(squares.sum() / (4 * white.sum())), rel=1e-5)
    assert float(loss) != pytest.approx(float((said - noise).square().mean()), rel=1e-3)


# --- caches ---------------------------------------------------------------------------------


def same(one, two):
    """Whether two samples are equal to the bit."""
    pairs = [(one.moments, two.moments), (one.mask, two.mask)]
    for mine, theirs in zip(one.conditions, two.conditions, strict=True):
        pairs += [(mine[name], theirs[name]) for name in mine.keys() | theirs.keys()]
    return all((a is None and b is None) or a.equal(b) for a, b in pairs)


def test_what_comes_from_the_disk_is_what_was_computed(cache_of, few):
    masked(few, left_half)
    recipe = {"caption_shuffle": True, "flip": True, "masked_loss": True}
    for picture in pictures(few, **recipe):
        computed = cache_of(**recipe, cache="ram").sample(picture)
        written = cache_of(**recipe, cache="disk").sample(picture)
        again = cache_of(**recipe, cache="disk").sample(picture)
        assert same(computed, written)
        assert same(computed, again)


class Counting:
    """A model that counts what it encodes."""

    def __init__(self, model):
        self._model = model
        self.encoded = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_image(self, image):
        self.encoded.append("image")
        return self._model.encode_image(image)

    def encode_texts(self, texts):
        self.encoded.append("text")
        return self._model.encode_texts(texts)


def test_a_second_training_on_the_same_disk_encodes_nothing_again(model, tmp_path, few):
    from gpu_agent.lora.cache import Cache

    def encode(origin="here", **recipe):
        counting = Counting(model)
        chosen = Recipe(**TINY, cache="disk", **recipe)
        cache = Cache(counting, chosen, tmp_path / "cache", origin)
        for picture in pictures(few, **recipe):
            cache.sample(picture)
        return sorted(counting.encoded)

    everything = ["image", "image", "text", "text"]
    assert encode() == everything
    assert encode() == []
    # another base, or another way to look at the images, is another thing
    assert encode(origin="elsewhere") == everything
    assert encode(flip=True) == ["image"] * 4
    (few / "coffee.txt").write_text("sks, a cup")
    assert encode() == ["text"]
    for number, file in enumerate(sorted((tmp_path / "cache").iterdir())):
        raw = bytearray(file.read_bytes())
        if number % 3 == 0:
            file.write_bytes(raw[: len(raw) // 2])
        elif number % 3 == 1:
            file.write_bytes(b"")
        else:  # as long as before, but one bit is another
            raw[-1] ^= 1
            file.write_bytes(raw)
    assert encode() == everything
    assert encode() == []


def test_the_disk_is_taken_when_memory_would_be_short(cache_of, few):
    found = pictures(few)
    cache = cache_of(cache="auto")
    cache.expect(found)
    assert not cache.on_disk
    cache.expect([*found, replace(found[0], bucket=(10**7, 10**7))])
    assert cache.on_disk


def test_an_image_of_which_the_vae_makes_no_numbers_is_named(cache_of, model, few):
    import torch

    weight = model.vae.encoder.conv_in.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    try:
        with pytest.raises(DatasetError, match=r"chelsea\.jpg") as caught:
            cache_of().sample(pictures(few)[0])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert caught.value.code == "dataset.image"


# --- prior preservation ---------------------------------------------------------------------

PRIOR = {
    "steps": 2,
    "validation_every": 2,
    "batch_size": 2,
    "learning_rate": 0.01,
    "prior_prompt": "a cup",
}


@pytest.fixture(scope="module")
def with_prior(tmp_path_factory, workshop_in):
    """A training beside two images of the class, which the base painted."""
    workshop = workshop_in(tmp_path_factory.mktemp("prior"))
    job = workshop.job(prior_images=2, **PRIOR)
    heard, done = workshop.train(job)
    assert done
    return workshop, job, heard


def test_images_of_the_class_are_painted_before_the_training(with_prior):
    _, job, heard = with_prior
    painted = sorted(Path(job["work_dir"]).glob("prior/*/*.png"))
    assert len(painted) == 2
    with Image.open(painted[0]) as one, Image.open(painted[1]) as other:
        assert one.size == other.size == (64, 64)
        assert one.tobytes() != other.tobytes()
    assert "prior" in {event["phase"] for event in heard.all("alive")}
    started = heard.one("started")
    assert (started["images"], started["regularization"]) == (4, 2)
    assert started["label"] == "train-eval"


def test_painted_images_follow_from_the_seed_and_are_not_painted_again(cache_of, model, tmp_path):
    from accelerate import Accelerator

    from gpu_agent.lora import prior
    from gpu_agent.lora.talk import Orders, Pulse

    def paint():
        recipe = Recipe(**TINY, prior_prompt="a cup", prior_images=2)
        pulse, accelerator = Pulse(Silent(), Orders()), Accelerator(cpu=True)
        return prior.painted(model, cache_of(), recipe, tmp_path / "prior", accelerator, pulse)

    first = paint()
    broken, whole = (picture.path for picture in first)
    before = whole.stat().st_mtime_ns
    broken.write_bytes(broken.read_bytes()[:100])  # as a full disk would leave it
    assert paint() == first
    assert whole.stat().st_mtime_ns == before


class Silent:
    """Hears nothing."""

    def emit(self, event, **fields): ...


def test_images_of_the_class_count_by_their_weight_and_are_not_validated(workshop, with_prior):
    def losses(heard):
        return [event["loss"] for event in heard.all("validation")]

    plain, _ = workshop.train(workshop.job("plain", **{**PRIOR, "prior_prompt": ""}))
    light, _ = workshop.train(workshop.job("light", **PRIOR, prior_images=2, prior_weight=1e-9))
    full = losses(with_prior[2])
    assert losses(plain)[0] == losses(light)[0] == full[0]
    assert losses(light)[1] == pytest.approx(losses(plain)[1], abs=1e-5)
    assert full[1] != pytest.approx(losses(plain)[1], abs=1e-5)


# --- all of it together ---------------------------------------------------------------------

ALL = {
    "steps": 3,
    "validation_every": 3,
    "batch_size": 2,
    "caption_shuffle": True,
    "caption_dropout": 0.3,
    "flip": True,
    "masked_loss": True,
    "prior_prompt": "a rocket",
    "checkpoint_s": 1e-6,
    "learning_rate": 0.01,
}


def losses_of(heard):
    """The base's, when it was validated, and those of the steps that it was trained for."""
    rows = list(csv.DictReader(result(heard)[1].decode().splitlines()))
    return [rows[0]["validation_loss"], *(row["loss"] for row in rows[1:])]


@pytest.fixture(scope="module")
def with_all(tmp_path_factory, workshop_in, photos):
    """A training with masks, shuffled captions and an image of the class that was brought."""
    folder = tmp_path_factory.mktemp("all")
    images = brought(photos, folder)
    masked(images, left_half)
    (images / "coffee.txt").unlink()
    (images / "regularization").mkdir()
    shutil.copy(photos / "rocket.jpg", images / "regularization")
    workshop = replace(workshop_in(folder), photos=images)
    heard, done = workshop.train(workshop.job("whole", cache="ram", **ALL))
    assert done
    return workshop, heard


def test_a_training_with_all_of_it_goes_on_bit_for_bit(with_all):
    workshop, whole = with_all
    moved = workshop.folder / "moved"
    shutil.copytree(whole.all("checkpoint")[1]["path"], moved)
    resumed, _ = workshop.train(workshop.job("resumed", cache="disk", resume_dir=moved, **ALL))
    started = resumed.one("started")
    assert started["step"] == 2
    # what the customer may not have wanted
    assert started["warnings"] == ["no caption, so called 'a photo of sks': coffee.jpg"]
    assert result(resumed) == result(whole)


def test_masks_count_in_training_and_in_validation(with_all):
    workshop, whole = with_all
    plain, _ = workshop.train(workshop.job("plain", **{**ALL, "masked_loss": False}))
    assert all(one != two for one, two in zip(losses_of(whole), losses_of(plain), strict=True))


def test_shuffled_captions_are_trained_on_and_written_ones_validated(with_all):
    workshop, whole = with_all
    still, _ = workshop.train(workshop.job("still", **{**ALL, "caption_shuffle": False}))
    mine, theirs = losses_of(whole), losses_of(still)
    assert mine[0] == theirs[0]
    assert mine[1:] != theirs[1:]
