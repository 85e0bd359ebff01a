"""Checkpoints on a disk, without a model."""

import json
import shutil

import pytest

from gpu_agent.lora.evaluate import Validation

BELONGS = {"recipe": "r", "dataset": "d", "base": "b"}


@pytest.fixture(scope="module")
def checkpoint():
    from gpu_agent.lora import checkpoint

    return checkpoint


@pytest.fixture
def progress(checkpoint):
    """Where a training is at a step, given the validation losses so far."""
    import torch

    def at(step, **losses):
        return checkpoint.Progress(
            step=step,
            lora={"unet.a.lora_A.weight": torch.full((2, 3), float(step))},
            state={"optimizer": {"step": step}, "losses": torch.ones(step)},
            validations={int(key[1:]): Validation(loss, 0.1) for key, loss in losses.items()},
        )

    return at


@pytest.fixture
def open_in(checkpoint):
    return lambda folder, keep=1, **other: checkpoint.Checkpoints(
        folder, checkpoint.Belongs(**{**BELONGS, **other}), keep
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weight(tensors):
    return float(tensors["unet.a.lora_A.weight"][0, 0])


def test_what_is_saved_comes_back(tmp_path, open_in, progress):
    saved = open_in(tmp_path / "a").save(progress(3, s0=2.0, s3=1.0))
    back = open_in(tmp_path / "b").adopt(saved)
    assert back.step == 3
    assert weight(back.lora) == 3
    assert back.state["optimizer"] == {"step": 3}
    assert back.validations == {0: Validation(2.0, 0.1), 3: Validation(1.0, 0.1)}


def test_the_k_best_and_the_last_stay(tmp_path, open_in, progress):
    store = open_in(tmp_path, keep=2)
    losses = {"s0": 9.0}
    for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, 6.0], start=1):
        losses[f"s{step}"] = loss
        store.save(progress(step, **losses))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_the_untrained_model_is_never_the_best_and_equals_go_to_the_earlier(progress):
    assert progress(2, s0=0.1, s1=3.0, s2=3.0).best_step == 1
    assert progress(0, s0=0.1).best_step is None


def test_the_best_weights_travel_with_each_checkpoint(tmp_path, open_in, progress):
    first = open_in(tmp_path / "first")
    first.save(progress(1, s1=1.0))
    last = first.save(progress(2, s1=1.0, s2=2.0))
    # two moves to other machines, of each of which only the newest checkpoint was kept
    for number in range(2):
        moved = tmp_path / f"moved-{number}"
        shutil.copytree(last, moved / last.name)
        store = open_in(tmp_path / f"machine-{number}")
        store.adopt(moved / last.name)
        now = progress(3 + number, s1=1.0, s2=2.0, s3=2.0)
        last = store.save(now)
        assert weight(store.best_lora(now)) == 1


def test_a_better_step_after_a_move_is_the_best(tmp_path, open_in, progress):
    first = open_in(tmp_path / "first")
    first.save(progress(1, s1=2.0))
    store = open_in(tmp_path / "second")
    store.adopt(first.save(progress(2, s1=2.0, s2=3.0)))
    now = progress(3, s1=2.0, s2=3.0, s3=1.0)
    store.save(now)
    assert weight(store.best_lora(now)) == 3


def test_a_write_that_was_cut_off_leaves_no_checkpoint(tmp_path, checkpoint, open_in, progress):
    saved = open_in(tmp_path).save(progress(1))
    saved.rename(tmp_path / "step-00000002.part")
    assert checkpoint.candidates(tmp_path / "nowhere") == []
    open_in(tmp_path)
    assert names(tmp_path) == []


def test_the_newest_of_several_is_tried_first(tmp_path, checkpoint, open_in, progress):
    store = open_in(tmp_path, keep=5)
    for step in (9, 10, 11):
        store.save(progress(step, **{f"s{number}": 1.0 for number in range(9, step + 1)}))
    found = [path.name for path in checkpoint.candidates(tmp_path)]
    assert found == ["step-00000011", "step-00000010", "step-00000009"]
    assert checkpoint.candidates(tmp_path / found[0]) == [tmp_path / found[0]]


def truncate(folder):
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[:-10])


def flip_a_bit(folder):
    lora = bytearray((folder / "lora.safetensors").read_bytes())
    lora[-1] ^= 1
    (folder / "lora.safetensors").write_bytes(lora)


def lose_a_file(folder):
    (folder / "lora.safetensors").unlink()


def garble(folder):
    (folder / "manifest.json").write_bytes(b"\xff\x00")


def empty(folder):
    (folder / "manifest.json").write_text("{}")


def format_of_the_future(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    "spoil", [truncate, flip_a_bit, lose_a_file, garble, empty, format_of_the_future]
)
def test_a_broken_checkpoint_is_not_continued(tmp_path, checkpoint, open_in, progress, spoil):
    saved = open_in(tmp_path / "a").save(progress(1))
    spoil(saved)
    with pytest.raises(checkpoint.Unusable, match="step-00000001"):
        open_in(tmp_path / "b").adopt(saved)
    assert names(tmp_path / "b") == []


@pytest.mark.parametrize("key", BELONGS)
def test_another_trainings_checkpoint_is_not_continued(
    tmp_path, checkpoint, open_in, progress, key
):
    saved = open_in(tmp_path / "a").save(progress(1))
    with pytest.raises(checkpoint.Unusable, match=f"another {key}"):
        open_in(tmp_path / "b", **{key: "x"}).adopt(saved)


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path, checkpoint, open_in, progress):
    import torch

    saved = open_in(tmp_path / "a").save(progress(1))

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), saved / "state.pt")
    manifest = json.loads((saved / "manifest.json").read_bytes())
    manifest["files"].pop("state.pt")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Unusable):
        open_in(tmp_path / "b").adopt(saved)
    assert not (tmp_path / "sprung").exists()
