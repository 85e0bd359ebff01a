"""Checkpoints on a disk, without a model."""

import contextlib
import json
import shutil

import pytest

from gpu_agent.lora.choose import Validation

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


def test_the_k_best_and_the_last_two_stay(tmp_path, open_in, progress):
    store = open_in(tmp_path, keep=2)
    losses = {"s0": 9.0}
    for step, loss in enumerate([5.0, 1.0, 2.0, 4.0, 6.0, 7.0], start=1):
        losses[f"s{step}"] = loss
        store.save(progress(step, **losses))
    kept = ["step-00000002", "step-00000003", "step-00000005", "step-00000006"]
    assert names(tmp_path) == kept


def test_checkpoints_between_validations_do_not_pile_up(tmp_path, open_in, progress):
    store = open_in(tmp_path, keep=3)
    for step in range(1, 8):
        store.save(progress(step, s0=2.0, s1=1.0))
    assert names(tmp_path) == ["step-00000001", "step-00000006", "step-00000007"]


def test_the_untrained_model_is_never_the_best_and_equals_go_to_the_earlier(progress):
    assert progress(2, s0=0.1, s1=3.0, s2=3.0).best_step == 1
    assert progress(0, s0=0.1).best_step is None


def test_the_best_weights_travel_with_each_checkpoint(tmp_path, open_in, progress):
    first = open_in(tmp_path / "first")
    first.save(progress(1, s1=1.0))
    last = first.save(progress(2, s1=1.0, s2=2.0))
    # two moves to other machines, of each of which only the newest checkpoint was kept
    for number in range(2):
        # under whatever name it travels
        moved = tmp_path / f"moved-{number}"
        shutil.copytree(last, moved)
        store = open_in(tmp_path / f"machine-{number}")
        store.adopt(moved)
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
    (folder / "about.json").write_bytes(b"\xff\x00")


def empty(folder):
    (folder / "about.json").write_text("{}")


def another_step(folder):
    about = json.loads((folder / "about.json").read_bytes())
    (folder / "about.json").write_text(json.dumps({**about, "step": 2}))


def format_of_the_future(folder):
    about = json.loads((folder / "about.json").read_bytes())
    (folder / "about.json").write_text(json.dumps({**about, "format": 99}))


@pytest.mark.parametrize(
    "spoil",
    [truncate, flip_a_bit, lose_a_file, garble, empty, another_step, format_of_the_future],
)
def test_a_broken_checkpoint_is_not_continued(tmp_path, checkpoint, open_in, progress, spoil):
    saved = open_in(tmp_path / "a").save(progress(1))
    spoil(saved)
    with pytest.raises(checkpoint.Unusable, match="step-00000001"):
        open_in(tmp_path / "b").adopt(saved)
    assert names(tmp_path / "b") == []


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, lose_a_file, garble, empty])
def test_a_broken_one_leaves_the_one_before_it(tmp_path, checkpoint, open_in, progress, spoil):
    store = open_in(tmp_path)
    store.save(progress(9))
    spoil(store.save(progress(10)))
    for found in checkpoint.candidates(tmp_path):
        with contextlib.suppress(checkpoint.Unusable):
            assert store.adopt(found).step == 9
    assert names(tmp_path) == ["step-00000009"]


def test_a_checkpoint_is_written_beside_the_training_and_announced_when_it_is_whole(
    tmp_path, checkpoint, open_in, progress
):
    announced = []
    saver = checkpoint.Saver(
        open_in(tmp_path), lambda saved, path: announced.append((saved.step, names(path)))
    )
    saver.save(progress(1))
    saver.save(progress(2))
    saver.wait()
    files = ["about.json", "lora.safetensors", "state.pt"]
    assert announced == [(1, files), (2, files)]


def test_a_checkpoint_that_could_not_be_written_is_told_at_the_next_one(
    tmp_path, checkpoint, open_in, progress
):
    store = open_in(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    saver = checkpoint.Saver(store, lambda saved, path: None)
    saver.save(progress(1))
    with pytest.raises(FileNotFoundError):
        saver.save(progress(2))


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
    about = json.loads((saved / "about.json").read_bytes())
    about["files"].pop("state.pt")
    (saved / "about.json").write_text(json.dumps(about))
    with pytest.raises(checkpoint.Unusable):
        open_in(tmp_path / "b").adopt(saved)
    assert not (tmp_path / "sprung").exists()
