"""The catalogue of mutations fits the code, the tests and the page. Costs next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from .catalogue import INVARIANTS, MUTATIONS, Mutation
from .page import markdown

ROOT = Path(__file__).parents[2]
every_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda item: item.what)


def test_no_invariant_is_left_out() -> None:
    assert list(INVARIANTS) == [f"I{number}" for number in range(1, 24)]
    assert {mutation.invariant for mutation in MUTATIONS} == set(INVARIANTS)


@every_mutation
def test_what_a_mutation_replaces_stands_once_where_it_says(mutation: Mutation) -> None:
    source = (ROOT / mutation.path).read_text()
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), mutation.path, "exec")


@every_mutation
def test_the_tests_that_a_mutation_must_fail_exist(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_the_page_in_the_docs_is_the_catalogue() -> None:
    assert (ROOT / "docs" / "invariants.md").read_text() == markdown()
