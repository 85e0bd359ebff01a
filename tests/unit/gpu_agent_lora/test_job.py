import json

import pytest

from gpu_agent.lora.errors import JobError
from gpu_agent.lora.job import Job

GOOD = {
    "base_file": "b.safetensors",
    "base_family": "sd1",
    "images_dir": "i",
    "output_dir": "o",
    "work_dir": "w",
    "recipe": {"steps": 3},
}


def test_a_job_is_read(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(GOOD))
    job = Job.read(tmp_path / "job.json")
    assert job.recipe.steps == 3
    assert job.resume_dir is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null"])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(JobError) as caught:
        Job.read(tmp_path / "job.json")
    assert caught.value.code == "job.invalid"


@pytest.mark.parametrize("key", [key for key in GOOD if key != "recipe"])
def test_a_missing_path_is_named(key):
    with pytest.raises(JobError, match=key):
        Job.from_dict({**GOOD, key: None})


def test_every_fault_of_a_recipe_is_told_at_once():
    recipe = {"steps": -1, "rank": 0, "learning_rat": 1}
    with pytest.raises(JobError, match=r"learning_rat .*steps .*rank ") as caught:
        Job.from_dict({**GOOD, "recipe": recipe})
    assert caught.value.code == "recipe.invalid"
