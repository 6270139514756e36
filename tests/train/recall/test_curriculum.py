"""The curriculum: how pairs grow, what they may depend on, and that the state survives a checkpoint exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.recall.curriculum import Curriculum, CurriculumConfig

accuracies = st.lists(st.floats(0, 1), max_size=80)
configs = st.builds(
    CurriculumConfig,
    kind=st.sampled_from(["off", "linear", "when_solved"]),
    steps=st.integers(1, 60),
    threshold=st.floats(0.1, 0.9),
    growth=st.sampled_from(["double", "increment"]),
)


def run(curriculum: Curriculum, results: list[float], first_step: int = 0) -> list[int]:
    """The pairs of every step, the one after the last result included."""
    pairs = [curriculum.size]
    for step, accuracy in enumerate(results, start=first_step):
        curriculum.update(step, accuracy)
        pairs.append(curriculum.size)
    return pairs


@given(configs, st.integers(1, 20), accuracies)
def test_pairs_stay_between_one_and_k_and_never_shrink(config, num_pairs, results):
    pairs = run(Curriculum(config, num_pairs), results)
    assert pairs == sorted(pairs)
    assert set(pairs) <= set(range(1, num_pairs + 1))
    assert pairs[0] == (num_pairs if config.kind == "off" else 1)


@given(configs, st.integers(1, 20), accuracies, accuracies)
def test_pairs_depend_on_the_past_only(config, num_pairs, past, future):
    alone = run(Curriculum(config, num_pairs), past)
    continued = run(Curriculum(config, num_pairs), past + future)
    assert continued[: len(alone)] == alone


@given(configs, st.integers(1, 20), accuracies, accuracies)
def test_a_restored_curriculum_goes_on_as_the_original(config, num_pairs, past, future):
    original, restored = Curriculum(config, num_pairs), Curriculum(config, num_pairs)
    run(original, past)
    restored.load_state_dict(original.state_dict())
    assert run(restored, future, len(past)) == run(original, future, len(past))
    assert restored.state_dict() == original.state_dict()


@given(st.integers(1, 60), st.integers(1, 20), accuracies, accuracies)
def test_linear_growth_is_a_function_of_the_step(steps, num_pairs, some, others):
    config = CurriculumConfig(kind="linear", steps=steps)
    pairs, other_pairs = run(Curriculum(config, num_pairs), some), run(Curriculum(config, num_pairs), others)
    shared = min(len(pairs), len(other_pairs))
    assert pairs[:shared] == other_pairs[:shared]
    assert all(size == num_pairs for size in pairs[steps:])


@pytest.mark.parametrize(
    ("growth", "sizes"), [("double", [1, 2, 4, 8, 10]), ("increment", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])]
)
def test_solved_sizes_grow(growth, sizes):
    pairs = run(Curriculum(CurriculumConfig(growth=growth), 10), [1.0] * 200)
    assert sorted(set(pairs)) == sizes
    # From zero, 1 - 0.8^n first exceeds 0.9 after n = 11 perfect steps.
    assert pairs.count(1) == 11


def test_unsolved_sizes_do_not_grow():
    assert set(run(Curriculum(CurriculumConfig(), 10), [0.9] * 200)) == {1}


@pytest.mark.parametrize("bad", [{"steps": 0}, {"threshold": 0.0}, {"threshold": 1.0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=f"curriculum.{next(iter(bad))}"):
        CurriculumConfig(**bad)
