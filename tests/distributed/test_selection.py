"""Knowledge selection under several ranks: all choose alike, and the student begins anew."""

from __future__ import annotations

import pytest
from tiny_runs import NO_DROPOUT, bert, config_tree, write_config, write_reviews

EPISODES, STEPS, PHASE = 2, 6, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("selection")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(
        folder / "unused",
        task,
        teacher={"model": bert(4, initializer_range=0.2, **NO_DROPOUT)},
        student={"model": bert(2, **NO_DROPOUT)},
        method={
            "name": "knowledge_selection",
            "episodes": EPISODES,
            "phase_steps": PHASE,
            "hidden": 8,
        },
    )
    # Large, so that the size of a gradient shows in the step that Adam takes.
    tree["train"] |= {"max_steps": STEPS, "adam_epsilon": 0.01}
    return str(write_config(folder / "run.yaml", tree))


@pytest.fixture
def learn(workers, config, tmp_path):
    """The findings of all ranks."""

    def learned(ranks: int, *overrides: str, how: str = "learn") -> list[dict]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        rows = f"train.per_device_train_batch_size={4 // ranks}"
        settings = [f"output_dir={out}", rows, *overrides]
        return workers(ranks).run(f"selection_cases.{how}", config, settings)

    return learned


@pytest.mark.parametrize(
    ("student", "action"),
    [
        pytest.param("zero0", "soft", marks=pytest.mark.slow),
        pytest.param("zero1", "soft", marks=pytest.mark.slow),
        pytest.param("zero2", "hard", marks=pytest.mark.slow),
        pytest.param("zero0", "hard", marks=pytest.mark.slow),
        pytest.param("zero1", "hard", marks=pytest.mark.slow),
        ("zero2", "soft"),
        pytest.param("zero3", "soft", marks=pytest.mark.slow),
        ("zero3", "hard"),
    ],
)
def test_two_ranks_choose_and_learn_as_one_does(learn, student, action):
    settings = (f"method.action={action}", f"student.deepspeed={student}")

    first, second = learn(2, *settings)
    (alone,) = learn(1, f"method.action={action}", "student.deepspeed=zero0")

    assert first["actions"] == second["actions"]
    for mine, other in zip(first["actions"], alone["actions"], strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    for name, weight in first["weights"].items():
        assert (weight - alone["weights"][name]).abs().max().item() <= 1e-4, name


@pytest.mark.parametrize(
    "student",
    [*(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in range(3)), "zero3"],
)
def test_a_student_that_begins_anew_is_as_it_was(learn, student):
    """Weights and optimizer: its first step is the first step again."""
    found = learn(2, f"student.deepspeed={student}", "train.lr_scheduler_type=constant")[0]

    assert len(found["beginnings"]) == EPISODES
    assert found["beginnings"][0] == found["beginnings"][1]


@pytest.mark.parametrize(
    ("student", "action"),
    [("zero2", "soft"), pytest.param("zero3", "hard", marks=pytest.mark.slow)],
)
def test_ranks_whose_processors_differ_take_the_action_of_the_first(learn, student, action):
    settings = (f"student.deepspeed={student}", f"method.action={action}", "method.noise=1.0")

    first, second = learn(2, *settings, how="learn_apart")

    assert first["actions"] == second["actions"]
    assert len({*map(tuple, first["actions"])}) > 1


@pytest.mark.parametrize(
    "student",
    [
        pytest.param("zero0", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        "zero2",
        "zero3",
    ],
)
def test_a_step_without_any_kind_is_taken_alike_at_every_zero_stage(learn, student):
    """Noise switches both kinds off in some phases: their loss is 0, with gradients of 0."""
    kinds = "objective=[{loss: hard_cross_entropy}, {loss: hidden_mse}]"
    settings = (kinds, "method.noise=20.0")

    first, second = learn(2, *settings, f"student.deepspeed={student}")
    (alone,) = learn(1, *settings, "student.deepspeed=zero0")

    assert (0.0, 0.0) in [tuple(action) for action in first["actions"]]
    assert first["actions"] == second["actions"]
    for name, weight in first["weights"].items():
        assert (weight - alone["weights"][name]).abs().max().item() <= 1e-4, name


@pytest.mark.parametrize(
    "student",
    [pytest.param("zero2", marks=pytest.mark.slow), "zero3"],
)
def test_a_kind_that_is_left_out_gets_no_gradient_of_an_earlier_step(learn, student):
    """Without a loss on the logits, neither the head nor the last layer is reached."""
    policy = "method={name: knowledge_selection, policy: random_hard}"
    kinds = "objective=[{loss: hard_cross_entropy}, {loss: hidden_mse, layer_mapping: ['1:2']}]"

    first, _ = learn(2, policy, kinds, f"student.deepspeed={student}")
    (alone,) = learn(1, policy, kinds, "student.deepspeed=zero0")

    for name, weight in first["weights"].items():
        assert (weight - alone["weights"][name]).abs().max().item() <= 1e-5, name


def test_one_choice_serves_all_micro_batches_of_a_step(learn):
    once = learn(2)[0]["actions"]
    twice = learn(2, "train.gradient_accumulation_steps=2")[0]["actions"]

    assert len(once) == len(twice) == (EPISODES + 1) * STEPS


def test_the_loss_is_measured_once_per_phase_and_once_before(learn):
    assert learn(2)[0]["measured"] == 1 + EPISODES * STEPS // PHASE


def test_no_two_ranks_draw_the_same_dropout_on_their_gpus(learn):
    """Neither projections nor a selector, which are equal on all ranks, seed a GPU."""
    first, second = learn(2, how="device_seeds")

    assert first
    assert set(first).isdisjoint(second)
