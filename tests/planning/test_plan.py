"""`megakd plan`: from a run config to numbers, and what to change where they are too large."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_cuts
import torch.distributed as dist
from planned_runs import CAUSAL, PROCESS, plan_of, trained
from planned_runs import config_of as run_config
from tiny_runs import bert, llama
from transformers import LlamaConfig

from megakd.config.run import RunConfig
from megakd.contract.views import View
from megakd.errors import ModelError
from megakd.planning.memory import PARTS, Share
from megakd.planning.phases import PlanningLab, planned_sources
from megakd.planning.plan import Cluster, Plan, page, plan_run
from megakd.planning.tracing import PhaseTraces

DECODERS = {
    "teacher": {"model": llama(3, width=32, vocab_size=64)},
    "student": {"model": llama(2, vocab_size=64)},
}
MINIDISC = {"name": "minidisc", "target_sparsity": 0.5, "sparsities": [0.25, 0.5], "round_to": 1}


def config_of(tmp_path: Path, *overrides: str, **sections: Any) -> RunConfig:
    models = {
        "teacher": {"model": bert(3, width=32, vocab_size=64)},
        "student": {"model": bert(2, width=16, vocab_size=64)},
    }
    return run_config(tmp_path, *overrides, **{**models, **sections})


def planned(config: RunConfig, **cluster: Any) -> Plan:
    return plan_of(config, **{"ranks": 1, **cluster})


def test_the_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    result = json.loads(json.dumps(planned(config_of(tmp_path), ranks=2).as_json()))
    assert not dist.is_initialized()

    assert result["ranks"] == 2
    assert set(result["roles"]) == {"teacher", "student"}
    assert all(set(parts) == set(PARTS) for parts in result["roles"].values())
    for key in ("peak_bytes_per_rank", "load_peak_bytes_per_rank", "process_bytes"):
        assert isinstance(result[key], int)
        assert result[key] > 0
    assert result["seconds_per_step"] is None
    assert result["fits"] is None


def test_peaks_contain_the_process_where_the_report_counts_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)

    def peaks(process: int, device: Any) -> tuple[int, int]:
        cluster = Cluster(ranks=2, device=device)
        plan = plan_run(config, cluster, process=process).as_json()
        return plan["peak_bytes_per_rank"], plan["host_bytes_per_rank"]

    for device, more in (("cpu", (500, 500)), ("cuda", (0, 500))):
        first, second = peaks(PROCESS, device), peaks(PROCESS + 500, device)
        assert (second[0] - first[0], second[1] - first[1]) == more


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("zero1", "teacher_zero0"), ("zero3_offload", "teacher_zero3")],
)
def test_more_ranks_never_need_more_memory(tmp_path: Path, student: str, teacher: str) -> None:
    overrides = (f"student.deepspeed={student}", f"teacher.deepspeed={teacher}")
    config = config_of(tmp_path, *overrides)
    peaks = [planned(config, ranks=ranks).peak_bytes_per_rank for ranks in (2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_smaller_batches_need_less_and_so_does_checkpointing_which_repeats_forwards(
    tmp_path: Path,
) -> None:
    def sized(*overrides: str) -> tuple[int, float]:
        plan = planned(config_of(tmp_path, "eval.per_device_eval_batch_size=1", *overrides))
        return plan.part("student", "activations"), max(phase.flops for phase in plan.phases)

    held, flops = sized()
    repeating = sized("train.gradient_checkpointing=true")

    assert repeating[0] < held
    assert repeating[1] > 1.05 * flops
    assert sized("train.per_device_train_batch_size=1")[0] < held


def test_an_evaluation_that_is_the_peak_is_named_with_its_key(tmp_path: Path) -> None:
    settings = ("eval.per_device_eval_batch_size=999", "student.deepspeed=zero0")
    plan = planned(config_of(tmp_path, *settings))
    assert "eval.per_device_eval_batch_size 999" in plan.as_json()["peak_moment"]
    assert "eval.per_device_eval_batch_size 999" in page(plan)


def test_an_evaluation_needs_no_more_than_training_where_no_batch_is_given(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    phases = PlanningLab(config, planned_sources(config), ranks=1, device="cuda").play()

    traces = PhaseTraces(phases[0], config, "cuda")

    evaluation, training = (
        max(point.live for point in trace.points)
        for trace in (traces.evaluated["student"], traces.learner[0])
    )
    assert evaluation < training


def test_rates_turn_operations_and_bytes_into_the_least_and_the_most_seconds(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, "student.deepspeed=zero2", "teacher.deepspeed=teacher_zero3")
    rates: Any = {"tflops": 1e-3, "gbps": (1e-3, 1e-5)}
    on_one = planned(config, ranks=4, **rates)
    on_two = planned(config, ranks=4, nodes=2, **rates)

    flops = trained(on_one).flops / 1e9
    within = trained(on_one).sent.total() / 1e6
    assert on_one.as_json()["seconds_per_step"] == pytest.approx(
        (max(flops, within), flops + within)
    )
    # Of four ranks on two nodes, one of three others is on the same node.
    between = within / 3 + 100 * within * 2 / 3
    assert on_two.as_json()["seconds_per_step"] == pytest.approx(
        (max(flops, between), flops + between)
    )
    assert f"{max(flops, within):.3g} to {flops + within:.3g}" in page(on_one)
    assert planned(config, ranks=2, tflops=1.0).as_json()["seconds_per_step"] is None
    assert planned(config, tflops=1.0).as_json()["seconds_per_step"] is not None


AT_ONCE = {"asynchronous": False}


@pytest.mark.parametrize(
    ("save", "host", "has_copy"),
    [
        ({}, None, True),
        ({}, 1000, False),
        ({"asynchronous": True}, 1000, True),
        (AT_ONCE, None, False),
        ({"save_steps": 4}, None, False),  # the last save makes no copy
    ],
)
def test_the_copy_of_a_save_beside_the_training_is_planned_on_the_host(
    tmp_path: Path, save: dict[str, Any], *, host: int | None, has_copy: bool
) -> None:
    train = {"per_device_train_batch_size": 4, "max_steps": 4}
    config = config_of(tmp_path, save={"save_steps": 2} | save, train=train)
    plan = planned(config, device="cuda", device_memory=10**9, host_memory=host, ranks=2)
    training = next(phase for phase in plan.phases if phase.name == "student")
    most = training.most

    # Both are the fp32 weights and two moments.
    optimizer = most[Share("student", "optimizer")]
    assert optimizer > 0
    assert most[Share("student", "checkpoint", "host")] == (optimizer if has_copy else 0)


def test_a_run_with_fine_tuning_needs_no_less_than_the_fine_tuning(tmp_path: Path) -> None:
    large = {"model": bert(3, width=64, vocab_size=64), "finetune": {"max_steps": 2}}
    alone = config_of(
        tmp_path,
        teacher=None,
        student={"model": large["model"]},
        method={"name": "finetune"},
        save=AT_ONCE,
    )
    whole = planned(config_of(tmp_path, teacher=large, save=AT_ONCE), device="cpu", ranks=2)
    fine_tuning = planned(alone, device="cpu", ranks=2)

    assert whole.highest.name == "teacher-finetune"
    assert whole.peak_bytes_per_rank == fine_tuning.peak_bytes_per_rank


FINETUNED = {"model": bert(3, width=32, vocab_size=64), "finetune": {"max_steps": 2}}
CUT = {"student": {"model": "from_teacher"}}


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        (
            {"teacher": FINETUNED, "baselines": ["alone"]},
            [
                *("teacher-finetune", "student", "alone", "student-scored", "alone-scored"),
                "teacher-scored",
            ],
        ),
        ({}, ["student", "student-scored", "teacher-scored"]),
        # Importance is measured once.
        (
            {**CUT, "method": MINIDISC, "baselines": ["direct"]},
            [
                *("specification", "trial-1", "trial-2", "direct"),
                *("trial-2-scored", "direct-scored", "trial-1-scored", "teacher-scored"),
            ],
        ),
        (
            {**CUT, "method": {**MINIDISC, "name": "maxidisc"}},
            [
                *("specification", "leg-sparsity-0.25", "student-through-sparsity-0.25"),
                *("leg-sparsity-0.5", "student-through-sparsity-0.25-scored"),
                *("leg-sparsity-0.25-scored", "teacher-scored"),
            ],
        ),
        (
            {**CUT, "method": {**MINIDISC, "name": "direct"}},
            ["specification", "student", "student-scored", "teacher-scored"],
        ),
    ],
    ids=["fine-tuning", "single", "minidisc", "maxidisc", "direct"],
)
def test_every_phase_of_a_run_is_planned(tmp_path: Path, sections: Any, names: list[str]) -> None:
    plan = planned(config_of(tmp_path, **sections))
    assert [phase.name for phase in plan.phases] == names
    assert all(phase.peak.total for phase in plan.phases)


@pytest.mark.parametrize(
    ("sections", "name", "line"),
    [
        (
            {**CUT, "method": {**MINIDISC, "importance_batch_size": 32}},
            "specification",
            "4 forwards of a rank for every 32 rows",
        ),
        (
            {"student": {"model": "from_teacher", "layers": 2}},
            "layers",
            f"{(3 + 1) * 32} forwards of a rank",
        ),
    ],
)
def test_forwards_of_an_importance_are_counted_as_they_are_made(
    tmp_path: Path, sections: Any, name: str, line: str
) -> None:
    config = config_of(tmp_path, "eval.per_device_eval_batch_size=4", **sections)
    plan = planned(config, ranks=2)
    assert f"{name}: {line}" in page(plan)


RELATIONS = {"loss": "relation_kl", "relation_heads": 2, "relations": ["query", "query_key"]}


def test_what_a_loss_works_with_is_planned(tmp_path: Path) -> None:
    plan = planned(config_of(tmp_path, objective=[RELATIONS]))
    assert plan.part("student", "activations") > 3 * (64 << 20)


def test_a_term_of_a_source_is_planned_over_texts_of_this_source(tmp_path: Path) -> None:
    kl, rollout = {"loss": "soft_target_kl"}, {"max_new_tokens": 8, "prompt_tokens": 4}
    data, texts = ({**kl, "on": source} for source in ("data", "rollouts"))
    whole, both, alone = (
        planned(
            config_of(
                tmp_path,
                task=CAUSAL,
                objective=terms,
                rollout={**rollout, "mix": mix},
                **DECODERS,
            )
        )
        for terms, mix in (([kl], 0.5), ([data, texts], 0.5), ([texts], 1.0))
    )

    flops = [trained(plan).flops for plan in (whole, both, alone)]
    # One row for the term of the other source.
    assert flops[1] == pytest.approx(flops[0], rel=2e-3)
    assert flops[2] == flops[0]
    assert both.as_json()["peak_bytes_per_rank"] >= whole.as_json()["peak_bytes_per_rank"]


def test_candidates_that_share_a_backward_hold_more_unless_blocks_are_repeated(tmp_path):
    def held(*overrides: str, together: int | None = None) -> int:
        method = {**MINIDISC, "passes_per_backward": together}
        plan = planned(config_of(tmp_path, *overrides, **CUT, method=method))
        return plan.part("student", "activations")

    shared = held()
    assert shared > 1.3 * held(together=1)
    assert held("train.gradient_checkpointing=true") < shared


def test_a_run_fits_if_a_gpu_has_its_peak_and_a_context(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    peak = planned(config).peak_bytes_per_rank

    enough = planned(config, device_memory=round((peak + 1.6e9) / 0.95))
    small = planned(config, device_memory=round((peak + 1.4e9) / 0.95))

    assert (enough.fits, small.fits) == (True, False)
    assert "The run fits." in page(enough)
    assert "The run does not fit: 0.1" in page(small)


def test_a_run_on_cpus_fits_if_the_memory_of_its_node_holds_it(tmp_path: Path) -> None:
    config, fits = config_of(tmp_path), {None: None, 1000: False, 10**15: True}

    result = {size: planned(config, device="cpu", ranks=2, host_memory=size).fits for size in fits}

    assert result == fits


def test_scores_of_all_pairs_of_tokens_are_planned_where_the_attention_has_them(
    tmp_path: Path,
) -> None:
    def peak(kind: str) -> int:
        words = [f"{role}.attn_implementation={kind}" for role in ("teacher", "student")]
        config = config_of(tmp_path, *words, task=CAUSAL | {"max_length": 32}, **DECODERS)
        return planned(config).peak_bytes_per_rank

    assert peak("eager") > peak("sdpa")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.txt", "\n".join(f"w{number}" for number in range(77))),
        # The numbers of tokens have gaps.
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 76}}, "added_tokens": [{"id": 9}]}'),
        ("tokenizer.json", '{"model": {"vocab": [["a", -1.0]]}, "added_tokens": [{"id": 76}]}'),
    ],
)
def test_a_tokenizer_below_the_home_folder_is_counted(
    tmp_path: Path, monkeypatch, name: str, content: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / name).write_text(content)
    student = {"model": bert(2, width=16)}

    config = config_of(tmp_path, "task.tokenizer=~/words", student=student)

    assert planned_sources(config)["student"].config.vocab_size == 77


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # Before the network is asked.
        ("README.md", "", r"config\.json does not exist"),
        ("config.json", "{", r"^student.model: "),
        ("config.json", '{"model_type": "unheard-of"}', r"^student.model: "),
        ("config.json", "{}", r"^student.model: "),
        ("config.json", '{"model_type": "bert", "dtype": "x"}', r"^student.model: "),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, name, content, message) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        planned(config_of(tmp_path, student={"model": str(folder)}))


def test_rows_that_are_longer_than_the_context_of_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"max_length is 4096 and the model takes at most \d+ tok"):
        planned(config_of(tmp_path, "task.max_length=4096"))


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "enct5"])
def test_one_of_three_layers_takes_a_third_of_the_time_also_beside_a_decoder(family, tmp_path):
    folder = tiny_cuts.saved(tiny_cuts.build(family), tmp_path)
    source = tiny_cuts.source_of(folder, "classification")
    config = cast("Any", SimpleNamespace(task=tiny_cuts.task()))
    pruning = PlanningLab(config, {}, ranks=1, device="cpu")
    units = source.architecture.units(source.config)
    kept = {"layers": (1,), "width": None}
    for kind in ("heads", "neurons"):
        first, _, _, *others = getattr(units, kind)
        kept[kind] = (first, 0, 0, *others)

    times = pruning.relative_times(source, {"one": View(**kept)}, "times")

    assert times["one"] == pytest.approx(1 / 3, abs=0.03)


def test_a_quantized_teacher_is_whole_on_every_rank_with_the_bytes_of_its_files(tmp_path):
    keys = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    teacher = LlamaConfig(**keys, intermediate_size=64, tie_word_embeddings=True)
    teacher.quantization_config = {"quant_method": "gptq", "bits": 4}
    teacher.save_pretrained(tmp_path / "teacher")
    count = 3 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    models = {**DECODERS, "teacher": {"model": str(tmp_path / "teacher")}, "task": CAUSAL}

    def weights() -> int:
        preset = "teacher.deepspeed=teacher_zero0"
        return planned(config_of(tmp_path, preset, **models), ranks=2).part("teacher", "weights")

    assert weights() == count / 2 + 64 * 32 * 2  # the embeddings stay in 16 bits
    (tmp_path / "teacher" / "model.safetensors").write_bytes(bytes(12345))
    assert weights() == 12345
    with pytest.raises(ModelError, match=r"\(gptq\), and ZeRO 3 cannot share its weights"):
        planned(config_of(tmp_path, "teacher.deepspeed=teacher_zero3", **models), ranks=2)
