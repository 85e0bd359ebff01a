import pytest
from PIL import Image

from gpu_agent.lora import data
from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe


def photo(path, size=(60, 40), **save):
    Image.new("RGB", size, "teal").save(path, **save)
    return path


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768, 1024])
def test_every_bucket_fits_the_network_and_the_area(resolution):
    shapes = data.buckets(resolution)
    step = 64 if resolution >= 256 else 16
    assert (resolution, resolution) in shapes
    for width, height in shapes:
        assert width % step == 0
        assert height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)
        assert (height, width) in shapes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((640, 640), (512, 512)),
        ((10, 1000), (320, 640)),
    ],
)
def test_an_image_goes_into_the_bucket_of_its_proportions(size, bucket):
    assert data.nearest(data.buckets(512), *size) == bucket


def test_a_phones_sideways_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", size=(400, 200), exif=exif)
    (picture,) = data.collect(tmp_path, Recipe(resolution=512))
    assert picture.bucket == (320, 640)
    assert picture.pixels().size == (320, 640)


def test_a_transparent_image_is_put_on_white(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (picture,) = data.collect(tmp_path, Recipe(resolution=64))
    assert picture.pixels().getpixel((5, 5)) == (255, 255, 255)


def test_a_caption_file_wins_over_the_template(tmp_path):
    recipe = Recipe(trigger="sks", caption_template="a photo of {trigger}")
    image = photo(tmp_path / "a.jpg")
    assert data.caption_of(image, recipe) == "a photo of sks"
    (tmp_path / "a.txt").write_text(" \n")
    assert data.caption_of(image, recipe) == "a photo of sks"
    (tmp_path / "a.txt").write_bytes("\ufeff{trigger} on a\n  bench, ébène\n".encode())
    assert data.caption_of(image, recipe) == "sks on a bench, ébène"


def test_without_a_trigger_the_template_leaves_no_trailing_space(tmp_path):
    assert data.caption_of(tmp_path / "a.jpg", Recipe()) == "a photo of"


def test_a_caption_that_is_no_text_names_its_file(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"a\.txt") as caught:
        data.collect(tmp_path, Recipe())
    assert caught.value.code == "dataset.caption"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_names_its_file(tmp_path, content):
    photo(tmp_path / "fine.png")
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.jpg") as caught:
        data.collect(tmp_path, Recipe())
    assert caught.value.code == "dataset.image"


def test_an_image_that_ends_too_early_names_its_file(tmp_path):
    noise = Image.effect_noise((300, 300), 80).convert("RGB")
    noise.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (picture,) = data.collect(tmp_path, Recipe())
    with pytest.raises(DatasetError, match=r"half\.jpg") as caught:
        picture.pixels()
    assert caught.value.code == "dataset.image"


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.jpg").write_bytes(b"resource fork")
    with pytest.raises(DatasetError) as caught:
        data.collect(tmp_path, Recipe())
    assert caught.value.code == "dataset.empty"


def many(tmp_path, count):
    for number in range(count):
        photo(tmp_path / f"{number:02}.png", size=(60 + number, 40))
    return data.collect(tmp_path, Recipe())


def test_few_images_are_trained_and_validated_on_alike(tmp_path):
    split = data.split(many(tmp_path, 7), Recipe())
    assert split.label == "train-eval"
    assert split.train == split.validation


def test_held_out_images_are_not_trained_on_and_do_not_depend_on_order(tmp_path):
    pictures = many(tmp_path, 20)
    split = data.split(pictures, Recipe(validation_share=0.1))
    assert split.label == "held-out"
    assert len(split.validation) == 2
    assert not set(split.train) & set(split.validation)
    assert len(data.distinct(split)) == 20
    again = data.split(pictures[::-1], Recipe(validation_share=0.1))
    assert set(again.validation) == set(split.validation)


def test_the_same_photograph_twice_is_held_out_together(tmp_path):
    pictures = many(tmp_path, 9)
    twins = [*pictures, *pictures]
    split = data.split(twins, Recipe(validation_share=0.1))
    held = {picture.digest for picture in split.validation}
    assert held.isdisjoint(picture.digest for picture in split.train)
