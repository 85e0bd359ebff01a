"""Base models of many files: a diffusers folder, or what a single file lacks."""

import textwrap

import pytest


def parts(stoker, **files):
    """Offer files beside the base; keys as the server is asked for them."""
    stoker.offer(**{f"base/{name}": body for name, body in files.items()})
    stoker.spec["base_parts"] = tuple(stoker.download(f"base/{name}", name) for name in files)


def trainer_that_sees(*names):
    return textwrap.dedent(
        f"""
        base = job["base_file"]
        folder = base if os.path.isdir(base) else os.path.dirname(base)
        found = sorted(
            os.path.relpath(os.path.join(at, name), folder)
            for at, _, files in os.walk(folder) for name in files
        )
        assert found == {sorted(names)!r}, found
        say("started", total=1)
        complete()
        """
    )


def test_a_folder_comes_file_by_file_and_the_trainer_is_given_the_folder(stoker, start, files):
    index = b'{"_class_name": "FluxPipeline"}'
    stoker.offer(base=index)
    stoker.spec["base"] = stoker.download("base", "model_index.json")
    body = files.safetensors()
    parts(stoker, **{"vae/config.json": b"{}", "vae/model.safetensors": body})
    code = 'assert os.path.isdir(job["base_file"])\n' + trainer_that_sees(
        "model_index.json", "vae/config.json", "vae/model.safetensors"
    )
    assert start(code).join() == 0
    ready = stoker.report("model.ready").data
    assert ready["bytes"] == len(index) + 2 + len(body)


def test_what_a_single_file_lacks_lies_beside_it(stoker, start):
    parts(stoker, **{"tokenizer/merges.txt": b"a b"})
    assert start(trainer_that_sees("tiny.safetensors", "tokenizer/merges.txt")).join() == 0


def test_a_part_whose_address_has_expired_is_asked_for_by_its_name(stoker, start):
    parts(stoker, **{"vae/config.json": b"{}"})
    asked = []

    def once_expired(handler):
        if "vae" in handler.path and not asked:
            asked.append(handler.path)
            stoker.expired = True
        return "ok"

    stoker.always["get"] = once_expired
    assert start(trainer_that_sees("tiny.safetensors", "vae/config.json")).join() == 0
    assert asked


@pytest.mark.parametrize("name", ["../../agent.pyz", "/etc/passwd", "a/../../b", ".ssh/x"])
def test_a_part_that_would_lie_elsewhere_ends_the_attempt(stoker, start, name):
    parts(stoker, **{name: b"x"})
    assert start().join() == 1
    error = stoker.report("error").data
    assert (error["code"], error["retryable"]) == ("model.unsafe", False)


def test_a_part_that_is_a_pickle_by_another_name_ends_the_attempt(stoker, start):
    parts(stoker, **{"vae/model.safetensors": b"\x80\x04\x95 a pickle of some length"})
    assert start().join() == 1
    assert stoker.report("error").data["code"] == "model.unsafe"
