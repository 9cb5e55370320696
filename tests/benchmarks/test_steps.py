"""Benchmarks of steps and calls: both sides compute one thing, and both are timed and printed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lib.clocks import Clocks, over_ranks
from lib.stages import ratio_over_ranks
from megakd.config.file import load_config
from speed import causal_bare
from speed.causal_bare import COUNTED, QUICK, TERMS, check_agree, write_case, write_chat
from speed.causal_megakd import check_same_tokens
from speed.chat_step import ChatBare

SMALL = "--vocabulary 300 --rows 2 --length 8 --pairs 3 --warm-up 1"
TINY = f"{SMALL} --teacher 2x32 --student 2x32"
SLOW = pytest.mark.slow
COMMANDS = [
    (f"speed.overhead {TINY} --alone 3", "step against a bare loop, 1 rank(s), 3 pairs"),
    ("speed.generation --ranks 2 --pairs 2 --model 1x64 --vocabulary 300 --rows 2 --tokens 3",
     "gathered once against sharded, 0.1M, 2 ranks, 2 x 3 tokens each"),
    ("speed.generation_rows --pairs 2 --prompt 12 --model 1x64 --vocabulary 300 --rows 6 "
     "--tokens 12 --ends 40", "leave / paged, temperature 0"),
    (f"speed.paired_steps sandwich --deepspeed zero3 {TINY} --grid 0.5,0.7",
     "a step of all candidates of MiniDisc against a plain step, 2 rank(s), teacher 2x32"),
    (f"speed.paired_steps pool {TINY} --ranks 1", "a teacher adds"),
    (f"speed.paired_steps kinds {TINY} --ranks 1", "against one with all four kinds"),
    ("speed.homodistil_steps --quick", "student's part of a step, 25% of every width, 2x32"),
    ("speed.causal_step --quick --pairs 2", "jsd, megakd, a step against a bare loop, 2 pairs"),
    ("speed.causal_step --chat --quick --pairs 2 --divergences jsd",
     "targets of a step: 16 in chat, 30 in text"),
    ("speed.latency --shape 2x48 --grid 0.5 --batches 1 --lengths 8 --ratios 2",
     "forward of 2x48 at sparsity 0.5, batch 1, 8 tokens"),
    ("speed.allocator --rounds 1 --steps 1", "| kept, large pages: "),
    ("memory.rollout_texts --steps 2 --rows 2 --tokens 8", "bytes a token on the wire"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "shown"),
    [pytest.param(*one, marks=[SLOW] if number > 2 else []) for number, one in enumerate(COMMANDS)],
    ids=[command.split()[0] for command, _ in COMMANDS],
)
def test_both_sides_are_measured_and_printed(built_operator, run, command, shown):
    ended = run(*command.split())
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout
    assert command.split()[0] in ended.stdout or "| what |" not in ended.stdout


@pytest.fixture
def logits():
    drawn = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 7, generator=drawn, dtype=torch.float64) for _ in range(2))


def test_forward_kl_is_the_sum_over_positions_of_the_teachers_divergence_from_the_student(logits):
    student, teacher = (F.softmax(each, dim=-1) for each in logits)
    found = causal_bare.forward_kl(*logits)
    assert torch.allclose(found, (teacher * (teacher / student).log()).sum())


def test_jsd_is_the_jensen_shannon_divergence(logits):
    q, p = (F.softmax(each, dim=-1) for each in logits)
    m = (p + q) / 2

    found = causal_bare.jsd(*logits)

    assert torch.allclose(found, ((p * (p / m).log()) + (q * (q / m).log())).sum() / 2)


def test_the_loss_of_a_chat_is_the_mean_over_the_tokens_that_count():
    models, (ids,) = causal_bare.random_models(QUICK), causal_bare.random_ids(QUICK, 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2:5] = ids[:, 3:6]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: F.pad(tensor, (0, 3)) for name, tensor in inputs.items()}
    batches = [
        SimpleNamespace(inputs=inputs, labels=labels),
        SimpleNamespace(inputs=padded, labels=F.pad(labels, (0, 3), value=-100)),
    ]

    bare = ChatBare(models, batches, causal_bare.forward_kl)

    with torch.no_grad():
        logits, soft = (one(input_ids=ids).logits[:, 2:5] for one in models)
    expected = float(causal_bare.forward_kl(logits, soft) / (3 * len(ids)))
    assert [bare.loss(0), bare.loss(1)] == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("counted", COUNTED)
def test_the_run_on_chats_has_the_words_and_the_objective_of_the_run_on_texts(tmp_path, counted):
    write_case(tmp_path, QUICK, "jsd")
    write_chat(tmp_path, QUICK, counted)

    text, chat = (load_config(tmp_path / place / "run.yaml") for place in ("", "chat"))

    assert [term.loss for term in chat.objective] == [TERMS["jsd"]["loss"]]
    assert (chat.train, chat.student, chat.teacher) == (text.train, text.student, text.teacher)
    words = " ".join(f"w{number}" for number in range(QUICK.length - 1))
    asked = 0 if counted == "all" else QUICK.length // 2
    messages = causal_bare.messages_of(words, asked)
    assert " ".join(message["content"] for message in messages) == words


def test_sides_that_compute_different_things_are_refused():
    def side(loss: float):
        return SimpleNamespace(loss=lambda index: loss + 0 * index)

    check_agree(side(1.00005), side(1.0), 0)
    with pytest.raises(ValueError, match=r"after 3 steps the loss is 1\.001, and the other side's"):
        check_agree(side(1.001), side(1.0), 3)
    with pytest.raises(ValueError, match="do not have the tokens of the text rows"):
        check_same_tokens([torch.tensor([1, 2])], [torch.tensor([1, 3])])


def test_cpu_time_is_that_of_all_ranks_and_wall_clock_that_of_the_slowest():
    by_rank = [[[(1.0, 4.0), (2.0, 2.0)]], [[(3.0, 5.0), (2.5, 1.0)]]]
    assert over_ranks(by_rank) == [[Clocks(4.0, 5.0), Clocks(4.5, 2.0)]]


def test_a_ratio_is_of_the_sums_over_ranks_and_the_fastest_steps_need_not_be_one_pair():
    # Per step: rank 0 takes 3 against 2 seconds, rank 1 takes 1 against 2.
    assert ratio_over_ranks([[[3.0, 2.0]] * 3, [[1.0, 2.0]] * 3]).median == 1.0
    ratio = ratio_over_ranks([[[4.0, 3.0], [5.0, 2.0]], [[2.0, 1.0], [9.0, 9.0]]])
    assert ratio.least == pytest.approx((4 + 2) / (2 + 1))
