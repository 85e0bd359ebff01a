"""Several processes at one training, as several GPUs would have them; here each has a CPU."""

import csv
import os
import signal

import pytest

RECIPE = {
    "steps": 6,
    "batch_size": 3,
    "flip": True,
    "caption_dropout": 0.3,
    "learning_rate": 0.01,
    "validation_every": 6,
    "checkpoint_s": 0,
}


def rows(completed):
    """Step, loss, rate, norm and validation of each row of the history."""
    (path,) = (file["path"] for file in completed["files"] if file["name"] == "loss_history.csv")
    with open(path, newline="") as file:
        _, *table = csv.reader(file)
    return [[float(cell) if cell else None for cell in row] for row in table]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(workshop, start):
    """From batches of 3 that do not divide by 2, the last of an epoch with a single image."""
    alone, _ = workshop.train(workshop.job("alone", **RECIPE))
    job = workshop.job("both", **RECIPE)
    both = start(job, arguments=["--processes", "2"])
    both.until("started")
    # the agent tells the whole group to end; the first needs the others until it has saved
    (other,) = children(both.process.pid)
    os.kill(other, signal.SIGTERM)
    completed = both.until("completed")
    assert both.end() == 0
    (started,) = (event for event in both.events if event["event"] == "started")
    assert started["processes"] == 2
    # losses before any step, after one, and the length of the gradient tell what was summed; Adam
    # then blows up the rounding of gradients that are next to nothing
    one, two = rows(alone.one("completed")), rows(completed)
    assert one[0] == two[0]
    for step in (1, 2):
        assert two[step][:4] == pytest.approx(one[step][:4], rel=1e-3)
    assert [row[1] for row in two[1:]] == pytest.approx([row[1] for row in one[1:]], rel=1e-3)
    assert completed["loss_best"] == pytest.approx(alone.one("completed")["loss_best"], rel=1e-3)


def test_killing_the_first_process_ends_the_others(workshop, start, until):
    trainer = start(workshop.job(**RECIPE), arguments=["--processes", "3"])
    trainer.until("alive")
    others = until(lambda: len(found := children(trainer.process.pid)) == 2 and found)
    trainer.process.kill()
    assert trainer.end() == -signal.SIGKILL
    until(lambda: not any(map(alive, others)))


def test_a_process_that_is_lost_is_an_error_of_the_whole(workshop, start, until):
    trainer = start(workshop.job(**RECIPE), arguments=["--processes", "2"])
    (other,) = until(lambda: children(trainer.process.pid))
    os.kill(other, signal.SIGKILL)
    error = trainer.until("error")
    assert trainer.end() == 1
    assert error["code"] == "trainer.internal"
    assert error["retryable"] is True
