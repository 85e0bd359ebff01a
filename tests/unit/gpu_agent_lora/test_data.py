import json

import numpy as np
import pytest
from PIL import Image, features

from gpu_agent.lora import data
from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe

#: Small, so that small images are large enough.
TINY = Recipe(resolution=64, trigger="sks")


def photo(path, size=(90, 60), colour="teal", **save):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, colour).save(path, **save)
    return path


def only(folder, recipe=TINY):
    """The one picture of a dataset."""
    (picture,) = data.collect(folder, recipe).pictures
    return picture


def refused(folder, recipe=TINY):
    """What a dataset is refused with, by the time its images are read."""

    def read():
        for picture in data.collect(folder, recipe).pictures:
            picture.pixels()
            picture.counting()

    with pytest.raises(DatasetError) as caught:
        read()
    return caught.value


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
    picture = only(tmp_path, Recipe(resolution=512))
    assert picture.bucket == (320, 640)
    assert picture.pixels().size == (320, 640)


# --- kinds of files -------------------------------------------------------------------------


def test_a_transparent_image_is_put_on_white(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert only(tmp_path).pixels().getpixel((5, 5)) == (255, 255, 255)


def grey16():
    return Image.fromarray(np.full((64, 64), 0x8000, np.uint16))


def fractions(value=0.5):
    return Image.fromarray(np.full((64, 64), value, np.float32))


def palette():
    return Image.new("RGB", (64, 64), (128, 128, 128)).quantize(4)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("deep.png", grey16),
        ("deep.tif", grey16),
        ("float.tiff", fractions),
        ("palette.png", palette),
        ("print.jpg", lambda: Image.new("CMYK", (64, 64), (0, 0, 0, 127))),
        ("grey.webp", lambda: Image.new("L", (64, 64), 128)),
        ("half.png", lambda: Image.new("LA", (64, 64), (0, 127))),
        ("UPPER.JPG", lambda: Image.new("RGB", (64, 64), (128, 128, 128))),
        ("with space ü 猫.bmp", lambda: Image.new("RGB", (64, 64), (128, 128, 128))),
    ],
)
def test_middle_grey_is_middle_grey_in_every_kind_of_file(tmp_path, name, make):
    folder = tmp_path / "sub folder"
    folder.mkdir()
    make().save(folder / name)
    colour = only(tmp_path).pixels().getpixel((9, 9))
    assert colour == pytest.approx((128, 128, 128), abs=2)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path):
    photo(tmp_path / "a.avif")
    assert only(tmp_path).size == (90, 60)


def test_heic_is_refused_by_its_name(tmp_path):
    photo(tmp_path / "fine.png")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic")
    error = refused(tmp_path)
    assert error.code == "dataset.image"
    assert "HEIC" in str(error)
    assert "IMG_1.HEIC" in str(error)
    (tmp_path / "IMG_1.HEIC").rename(tmp_path / "IMG_1.jpg")
    assert "IMG_1.jpg is a HEIC image" in str(refused(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\x00\xff\xff\xff\xff"],
)
def test_what_is_no_image_names_its_file(tmp_path, content):
    photo(tmp_path / "fine.png")
    (tmp_path / "broken.jpg").write_bytes(content)
    error = refused(tmp_path)
    assert error.code == "dataset.image"
    assert "broken.jpg" in str(error)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_an_image_that_ends_too_early_names_its_file(tmp_path, suffix):
    file = tmp_path / f"half{suffix}"
    Image.effect_noise((300, 300), 80).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    error = refused(tmp_path)
    assert error.code == "dataset.image"
    assert file.name in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 300.0])
def test_pixels_that_are_no_colours_name_their_file(tmp_path, value):
    image = fractions()
    image.putpixel((3, 3), value)
    image.save(tmp_path / "sick.tif")
    error = refused(tmp_path)
    assert error.code == "dataset.image"
    assert "sick.tif" in str(error)


def test_an_image_of_absurd_size_is_refused_before_it_is_unpacked(tmp_path):
    Image.new("1", (20_000, 6_000)).save(tmp_path / "bomb.png")
    error = refused(tmp_path)
    assert error.code == "dataset.image"
    assert "bomb.png has too many pixels" in str(error)


def test_of_an_animation_the_first_frame_is_taken_and_that_is_told(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = data.collect(tmp_path, TINY)
    assert found.pictures[0].pixels().getpixel((9, 9)) == (255, 0, 0)
    assert any("frames" in text and "a.webp" in text for text in found.warnings)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.jpg").write_bytes(b"resource fork")
    assert refused(tmp_path).code == "dataset.empty"


# --- sizes ----------------------------------------------------------------------------------


def test_small_images_are_enlarged_up_to_four_times_and_that_is_told(tmp_path):
    photo(tmp_path / "large.png", size=(600, 600))
    photo(tmp_path / "small.png", size=(128, 128))
    found = data.collect(tmp_path, Recipe(resolution=512))
    (told,) = [text for text in found.warnings if "enlarged" in text]
    assert "small.png (128x128)" in told
    assert "large.png" not in told
    photo(tmp_path / "tiny.png", size=(127, 128))
    error = refused(tmp_path, Recipe(resolution=512))
    assert error.code == "dataset.small"
    assert "tiny.png is 127x128 and needs 128x128" in str(error)
    assert "small.png" not in str(error)


def test_one_image_is_enough(tmp_path):
    photo(tmp_path / "a.png")
    split = data.split(data.collect(tmp_path, TINY).pictures, TINY)
    assert split.label == "train-eval"
    assert len(split.train) == 1


def test_the_same_picture_twice_is_trained_on_once_and_that_is_told(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "again" / "b.png")
    found = data.collect(tmp_path, TINY)
    assert [picture.path.name for picture in found.pictures] == ["a.png"]
    assert any("b.png (as a.png)" in text for text in found.warnings)


# --- captions -------------------------------------------------------------------------------


def test_a_caption_file_wins_over_the_template(tmp_path):
    recipe = Recipe(resolution=64, trigger="sks", caption_template="a photo of {trigger}")
    photo(tmp_path / "a.jpg")
    assert only(tmp_path, recipe).caption == "a photo of sks"
    (tmp_path / "a.txt").write_text(" \n")
    assert only(tmp_path, recipe).caption == "a photo of sks"
    (tmp_path / "a.txt").write_bytes("\ufeff{trigger} on a\n  bench, ébène\n".encode())
    assert only(tmp_path, recipe).caption == "sks on a bench, ébène"


def test_without_a_trigger_the_template_leaves_no_trailing_space(tmp_path):
    photo(tmp_path / "a.jpg")
    assert only(tmp_path, Recipe(resolution=64)).caption == "a photo of"


def test_captions_come_from_an_image_folders_metadata_too(tmp_path):
    for number, name in enumerate(("a.jpg", "b.jpg", "in/é.jpg")):
        photo(tmp_path / name, size=(90 + number, 60))
    rows = [
        {"file_name": "a.jpg", "text": "a {trigger}", "width": 60},
        {"file_name": "b.jpg", "text": "from the list"},
        # as macOS takes letters apart
        {"file_name": "in/e\u0301.jpg", "text": "a\u2028break"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines + "\n\n")
    (tmp_path / "b.TXT").write_text("from its own file")
    found = data.collect(tmp_path, TINY)
    assert [picture.caption for picture in found.pictures] == [
        "a sks",
        "from its own file",
        "a break",
    ]
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe\x00"),
        ("metadata.jsonl", b"\xff"),
        ("metadata.jsonl", b'{"file_name": "a.jpg"}'),
        ("metadata.jsonl", b'{"file_name": "a.jpg", "text": 1}'),
        ("metadata.jsonl", b"[1]"),
        ("metadata.jsonl", b"{"),
    ],
)
def test_captions_that_cannot_be_understood_name_their_file(tmp_path, name, content):
    photo(tmp_path / "a.jpg")
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path)
    assert error.code == "dataset.caption"
    assert name in str(error)


@pytest.mark.parametrize(
    ("recipe", "files", "told"),
    [
        ({}, {}, "neither captions nor a trigger word"),
        ({"trigger": "sks"}, {"a.txt": "a dog"}, "no caption has the trigger word 'sks'"),
        ({"trigger": "sks"}, {}, "no caption, so called 'a photo of sks': a.jpg"),
        ({"trigger": "sks"}, {"a.txt": ""}, "no caption, so called 'a photo of sks': a.jpg"),
        ({}, {"a.txt": "a", "b.txt": "b"}, "captions without an image: b.txt"),
        ({}, {"a.caption": "a"}, "not read: a.caption"),
        ({}, {"a.mask.png": ""}, "masks but masked_loss is off: a.mask.png"),
        ({"prior_prompt": "a dog"}, {}, "prior_prompt needs prior_images or a folder"),
    ],
)
def test_what_a_customer_may_not_want_is_told(tmp_path, recipe, files, told):
    photo(tmp_path / "a.jpg")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    warnings = data.collect(tmp_path, Recipe(resolution=64, **recipe)).warnings
    assert any(told in text for text in warnings), warnings


def test_nothing_is_told_of_a_tidy_dataset(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a photo of SKS")
    assert data.collect(tmp_path, TINY).warnings == ()


# --- masks ----------------------------------------------------------------------------------

MASKED = Recipe(resolution=64, trigger="sks", masked_loss=True)


def half_white(size):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_a_mask_is_no_picture_and_is_cut_as_its_image_is(tmp_path):
    image = Image.new("RGB", (200, 100))
    image.paste("white", (0, 0, 100, 100))
    image.save(tmp_path / "a.png")
    half_white((200, 100)).save(tmp_path / "a.mask.png")
    assert only(tmp_path).counting() is None
    picture = only(tmp_path, MASKED)
    # so that it is held out, and given noise, as without a mask
    assert picture.digest == only(tmp_path).digest
    mask = np.asarray(picture.counting())
    seen = np.asarray(picture.pixels().convert("L"))
    # the edge of one column may be softer
    assert mask.shape == seen.shape
    assert ((mask > 127) == (seen > 127)).mean() > 0.97
    assert 0.4 < (mask > 127).mean() < 0.6


def test_an_alpha_channel_is_a_mask_where_no_file_is(tmp_path):
    image = Image.new("RGBA", (64, 64), "teal")
    image.putalpha(half_white((64, 64)))
    image.save(tmp_path / "a.png")
    assert np.asarray(only(tmp_path, MASKED).counting()).mean() == 127.5
    photo(tmp_path / "plain.jpg")
    warnings = data.collect(tmp_path, MASKED).warnings
    assert any("without a mask all" in text and "plain.jpg" in text for text in warnings)


def test_a_turned_photographs_mask_is_as_one_sees_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", size=(80, 40), exif=exif)
    half_white((40, 80)).save(tmp_path / "a.mask.png")
    assert only(tmp_path, MASKED).counting().size == only(tmp_path, MASKED).bucket


@pytest.mark.parametrize(
    "mask",
    [
        lambda file: Image.new("L", (90, 60)).save(file),
        lambda file: Image.new("L", (60, 90), 255).save(file),
        lambda file: file.write_bytes(b"no image"),
        lambda file: file.write_bytes(b""),
    ],
    ids=["black", "of another shape", "no image", "empty"],
)
def test_a_mask_that_cannot_be_used_names_its_file(tmp_path, mask):
    photo(tmp_path / "a.png")
    mask(tmp_path / "a.mask.png")
    error = refused(tmp_path, MASKED)
    assert error.code == "dataset.mask"
    assert "a.mask.png" in str(error)


# --- prior preservation ---------------------------------------------------------------------


def test_images_of_the_class_are_a_set_of_their_own(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "regularization" / "b.png", colour="red")
    photo(tmp_path / "regularization" / "deep" / "c.png", colour="blue")
    (tmp_path / "regularization" / "b.txt").write_text("a red dog")
    found = data.collect(tmp_path, Recipe(resolution=64, trigger="sks", prior_prompt="a dog"))
    assert [picture.path.name for picture in found.pictures] == ["a.png"]
    assert [picture.caption for picture in found.regularization] == ["a red dog", "a dog"]


def test_images_of_the_class_alone_are_no_dataset(tmp_path):
    photo(tmp_path / "regularization" / "a.png")
    error = refused(tmp_path, Recipe(resolution=64, prior_prompt="a dog"))
    assert error.code == "dataset.empty"


def test_images_of_the_class_need_to_be_called_something(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "regularization" / "b.png", colour="red")
    error = refused(tmp_path)
    assert error.code == "dataset.caption"
    assert "regularization/b.png" in str(error)


# --- what is held out -----------------------------------------------------------------------


def many(tmp_path, count):
    for number in range(count):
        photo(tmp_path / f"{number:02}.png", size=(60 + number, 40))
    return data.collect(tmp_path, TINY).pictures


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
