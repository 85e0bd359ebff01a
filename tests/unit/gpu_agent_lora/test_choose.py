"""Which step is kept: by differences case by case, not by luck."""

from gpu_agent.lora.choose import Validation, best_step, candidates, waited


def course(*losses, spread=(0.0, 0.0)):
    """Validations every 10 steps, of two cases whose losses differ as `spread` says."""
    return {
        10 * number: Validation(
            loss, 0.5, cases=tuple(loss + (1 if number % 2 else -1) * apart for apart in spread)
        )
        for number, loss in enumerate(losses)
    }


def test_the_lowest_of_a_quiet_course_is_kept_however_far_its_cases_are_apart():
    falling = {
        step: Validation(loss, 2.0, cases=(loss - 3, loss + 3))
        for step, loss in ((0, 9.0), (10, 5.0), (20, 4.0), (30, 4.2))
    }
    assert best_step(falling) == 20


def test_of_steps_that_cannot_be_told_apart_the_earliest_is_kept():
    """Lower by 0.01, but one case says so and the other the contrary."""
    assert best_step(course(2.0, 1.0, 0.99, spread=(0.5, -0.5))) == 10
    assert best_step(course(2.0, 1.0, 0.99, spread=(0.001, -0.001))) == 20


def test_many_small_steps_down_are_not_missed():
    falling = course(*(2.0 - 0.01 * number for number in range(50)), spread=(0.1, -0.1))
    kept = best_step(falling)
    assert falling[kept].loss - falling[490].loss <= 0.2


def test_a_single_lucky_step_is_not_kept_nor_its_unlucky_neighbour():
    assert best_step(course(9, 5, 1, 5, 3, 3, 3)) == 40
    assert best_step(course(9, 5, 1, 9, 1, 5)) == 10


def test_the_untrained_model_is_never_kept_and_equals_go_to_the_earlier():
    assert best_step(course(0.1, 3.0, 3.0)) == 10
    assert best_step(course(0.1)) is None


def test_what_may_yet_be_kept_was_a_candidate_at_every_validation_before():
    """So that its weights are never thrown away too early."""
    whole = course(9, 5, 1, 5, 3, 3.2, 2.9, 4, 0.5, 6)
    for seen in range(2, len(whole) + 1):
        now = {step: whole[step] for step in sorted(whole)[:seen]}
        before = {step: whole[step] for step in sorted(whole)[: seen - 1]}
        assert best_step(now) in candidates(now)
        assert candidates(now) <= candidates(before) | {max(now)}


def test_patience_counts_validations_since_the_lowest_the_base_models_included():
    assert waited({}) == 0
    assert waited(course(1.0)) == 0
    assert waited(course(1.0, 0.5)) == 0
    assert waited(course(1.0, 0.5, 0.6, 0.5)) == 2
    assert waited(course(1.0, 1.1, 1.2)) == 2
