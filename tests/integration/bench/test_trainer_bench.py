"""The trainer's bench: a real training watched from outside, and what another one prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.bench import trainer
from orchestrator.cli import app

#: As diffusers 0.42's text-to-image LoRA script printed it: a bar that goes back to the start of
#: its line, between logging and other bars.
RECORDED = (
    "\rGenerating train split: 4 examples [00:00, 201.92 examples/s]\n"
    "11/23/2026 04:50:13 - INFO - __main__ - [RANK 0]   Total optimization steps = 12\n"
    "\rSteps:   0%|          | 0/12 [00:00<?, ?it/s]"
    "\rSteps:   8%|▊         | 1/12 [00:02<00:31,  2.82s/it]"
    "\rSteps:   8%|▊         | 1/12 [00:02<00:31,  2.82s/it, lr=0.0001, step_loss=1.16]"
    "\rSteps:  83%|████████▎ | 10/12 [00:21<00:04,  2.01s/it, lr=0.0001, step_loss=1.11]"
    "\rSteps: 100%|██████████| 12/12 [00:25<00:00,  1.94s/it, lr=0.0001, step_loss=1.13]"
    "Model weights saved in out/pytorch_lora_weights.safetensors\n"
)


def test_the_steps_of_diffusers_script_are_read_off_its_progress_bar() -> None:
    seen = trainer.STEP_OF[trainer.OTHER].findall(RECORDED.encode())
    assert [int(number) for number in seen] == [0, 1, 1, 10, 12]


@pytest.mark.skipif(not hasattr(trainer.os, "wait4"), reason="memory is told by wait4")
def test_a_trainer_is_timed_between_the_first_step_it_tells_and_the_last() -> None:
    # a program of its own that prints bars as tqdm does
    program = (
        "import sys\n"
        "for n in range(4):\n"
        "    sys.stderr.write(f'\\rSteps:  {n}%|#  | {n}/3 [00:00<00:00]'); sys.stderr.flush()\n"
        "    input_ = sum(range(200000))\n"
    )
    seen = trainer.watch(
        [sys.executable, "-c", program], trainer.STEP_OF[trainer.OTHER], dict(trainer.os.environ)
    )
    assert 0 < seen.first_step_s < seen.wall_s
    assert seen.steps_per_s > 0
    assert seen.rss_mb > 1


def test_a_trainer_that_ends_without_steps_is_told_with_its_last_words() -> None:
    argv = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(trainer.BenchFailed, match="no such model"):
        trainer.watch(argv, trainer.STEP_OF[trainer.OTHER], dict(trainer.os.environ))


@pytest.mark.slow
def test_the_trainer_bench_measures_a_real_training_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STOKER_DATA", str(tmp_path))
    command = ["bench", "trainer", "--steps", "3", "--repeats", "1", "--resolution", "64"]
    with pytest.raises(SystemExit) as ended:
        app.run([*command, "--threads", "1", "--json"])
    assert ended.value.code == 0
    measured = json.loads(capsys.readouterr().out)
    figures = measured["trainers"]["stoker"]
    assert {"steps_per_s", "first_step_s", "wall_s", "rss_mb"} <= figures.keys()
    assert 0 < figures["first_step_s"]["median"] < figures["wall_s"]["median"]
    # 16 attentions of two kinds, four layers each, rank 16: as peft has it for this model
    assert measured["trained_parameters"] == {"stoker": 312_320}
    assert measured["ran_on"]["torch"]
    assert list(tmp_path.iterdir()) == []
