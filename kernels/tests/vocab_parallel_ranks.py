"""One rank of `test_vocab_parallel`: runs every case on its slice of the vocabulary.

`python vocab_parallel_ranks.py RANK RENDEZVOUS CASES RESULT`, all of them files but the rank.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import megakd_kernels as mk


def main(rank, rendezvous, cases, result):
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    answers = [solve(rank, **case) for case in torch.load(cases)]
    torch.save(answers, result)
    distributed.destroy_process_group()


def solve(rank, *, inputs, cuts, options):
    """Loss, parts and gradients of this rank, or its error; both heads are cut at `cuts`."""
    parts = [slice(None, cut) if rank == 0 else slice(cut, None) for cut in cuts]
    student, teacher = inputs["student"], inputs["teacher"]
    weight, bias = inputs["student_weight"][parts[0]], inputs["student_bias"][parts[0]]
    leaves = [tensor.clone().requires_grad_() for tensor in (student, weight, bias)]
    options = {"vocab_start": rank * cuts[0], **options}
    try:
        output = mk.linear_kd_loss(
            *leaves[:2], teacher, inputs["teacher_weight"][parts[1]], inputs["labels"],
            student_bias=leaves[2], process_group=distributed.group.WORLD, **options,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return [*map(torch.Tensor.detach, output), *torch.autograd.grad(output.loss, leaves)]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
