"""A vocabulary on two ranks gives what the whole one gives."""

import sys
from datetime import timedelta
from subprocess import PIPE, Popen

import pytest
import torch
from torch import distributed

import megakd_kernels as mk

ALL = {name: 0.3 + 0.1 * index for index, name in enumerate(mk.DIVERGENCES)}
OPTIONS = [
    *({"divergence": name} for name in mk.DIVERGENCES),
    {"divergence": ALL, "ce_weight": 0.7, "temperature": 2.5},
    {"divergence": "forward_kl", "ce_weight": 1.0},
    {"divergence": ALL, "ce_weight": 0.7, "softcap_s": 3.0, "logit_scale_t": 0.5},
    {"divergence": ALL, "vocab_size": 29, "reduction": "mean"},
    {"divergence": ALL, "ce_weight": 0.7, "chunk_mb": 0.001},
]
# Ids of the student and of the teacher, and where both heads are cut: in the middle, with a
# longer student, with a longer teacher, and so that the second rank has no shared id.
SHAPES = [(37, 37, (20, 20)), (41, 37, (20, 20)), (33, 37, (30, 30)), (40, 30, (30, 30))]


def problem(student_ids, teacher_ids, rows=7):
    generator = torch.Generator().manual_seed(student_ids)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, min(student_ids, teacher_ids), (rows,), generator=generator)
    labels[3] = -100
    return {
        "student": random(rows, 5), "student_weight": random(student_ids, 5),
        "student_bias": random(student_ids), "teacher": random(rows, 6),
        "teacher_weight": random(teacher_ids, 6), "labels": labels,
    }  # fmt: skip


def all_cases():
    return [
        {
            "inputs": problem(student, teacher), "cuts": cuts,
            "options": {"t_squared": True, **options},
        }
        for student, teacher, cuts in SHAPES
        for options in OPTIONS
        if options.get("vocab_size", 0) <= min(student, teacher)
    ]  # fmt: skip


REFUSED = [
    ({"ce_weight": 1.0, "vocab_start": 0}, "is an id of several ranks: the slices overlap"),
    ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
]
"""Options of both ranks, and what both say."""


def refused_cases():
    return [
        {"inputs": problem(37, 37), "cuts": (20, 20), "options": {"t_squared": True, **options}}
        for options, _ in REFUSED
    ]


def run_rank(rank, rendezvous, cases, result):
    """Run every case on a rank's slice of the vocabulary; all but the rank are files."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    group = distributed.group.WORLD
    answers = [solve(**case, rank=rank, group=group) for case in torch.load(cases)]
    torch.save(answers, result)
    distributed.destroy_process_group()


def solve(inputs, options, cuts=(None, None), rank=0, group=None):
    """Loss, parts and gradients of this rank, or its error; both heads are cut at `cuts`."""
    parts = [slice(None, cut) if rank == 0 else slice(cut, None) for cut in cuts]
    student, teacher = inputs["student"], inputs["teacher"]
    weight, bias = inputs["student_weight"][parts[0]], inputs["student_bias"][parts[0]]
    leaves = [tensor.clone().requires_grad_() for tensor in (student, weight, bias)]
    options = {"vocab_start": rank and cuts[0], **options}
    try:
        output = mk.linear_kd_loss(
            *leaves[:2], teacher, inputs["teacher_weight"][parts[1]], inputs["labels"],
            student_bias=leaves[2], process_group=group, **options,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return [*map(torch.Tensor.detach, output), *torch.autograd.grad(output.loss, leaves)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return the answers of two ranks to every case."""
    folder = tmp_path_factory.mktemp("vocab_parallel")
    torch.save([*all_cases(), *refused_cases()], folder / "cases.pt")
    results = [folder / f"rank-{rank}.pt" for rank in range(2)]
    files = [folder / "rendezvous", folder / "cases.pt"]
    started = [
        Popen([sys.executable, __file__, str(rank), *files, result], stderr=PIPE)
        for rank, result in enumerate(results)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in started:
            process.kill()
    return [torch.load(result) for result in results]


@pytest.mark.parametrize("index", range(len(all_cases())))
def test_two_ranks_agree_with_the_whole_vocabulary(answers, index):
    case = all_cases()[index]
    expected = solve(case["inputs"], case["options"])

    first, second = answers[0][index], answers[1][index]

    for got in (first, second):
        torch.testing.assert_close(got[:-2], expected[:-2])
    for place in (-2, -1):  # a rank's rows of the head, and of its bias
        joined = torch.cat([first[place], second[place]])
        torch.testing.assert_close(joined, expected[place])


def test_slices_that_cannot_be_are_refused_on_all_ranks(answers):
    for of_rank in answers:
        for (_, message), said in zip(REFUSED, of_rank[-len(REFUSED) :], strict=True):
            assert message in said


def test_a_first_id_needs_a_group():
    one = torch.ones(2, 2)

    with pytest.raises(ValueError, match="vocab_start is 4: it must be 0 or more, and 0 without"):
        mk.linear_kd_loss(one, one, one, one, t_squared=True, vocab_start=4)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), *sys.argv[2:])
