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

from megakd import cli
from megakd.config.run import RunConfig
from megakd.errors import ModelError
from megakd.models.views import View
from megakd.reports import plan
from megakd.reports.plan import Cluster, Plan, page
from megakd.reports.plan_memory import PARTS, Share
from megakd.reports.plan_phases import PlannedWork, planned_phases, planned_sources
from megakd.reports.plan_tracing import PhaseTraces
from megakd.training.facts import RunFacts

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


def test_the_json_has_the_keys_of_the_contract(tmp_path):
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


@pytest.mark.parametrize(("device", "more"), [("cpu", (500, 500)), ("cuda", (0, 500))])
def test_peaks_contain_the_process_where_the_report_counts_it(tmp_path, device, more):
    first, second = (
        planned(config_of(tmp_path), process=size, device=device, ranks=2).as_json()
        for size in (PROCESS, PROCESS + 500)
    )
    peaks = ("peak_bytes_per_rank", "host_bytes_per_rank")
    assert tuple(second[peak] - first[peak] for peak in peaks) == more


def test_smaller_batches_need_less_and_so_does_checkpointing_which_repeats_forwards(tmp_path):
    plain, repeating, smaller = (
        planned(config_of(tmp_path, "eval.per_device_eval_batch_size=1", *more))
        for more in (
            (),
            ("train.gradient_checkpointing=true",),
            ("train.per_device_train_batch_size=1",),
        )
    )
    held, less, least = (
        plan.part("student", "activations") for plan in (plain, repeating, smaller)
    )
    flops, more = (max(phase.flops for phase in plan.phases) for plan in (plain, repeating))

    assert less < held
    assert least < held
    assert more > 1.05 * flops


@pytest.mark.parametrize("more", [(), ("train.gradient_checkpointing=true",)])
def test_fused_layers_need_less_on_a_gpu(tmp_path, more):
    fused, plain = (
        planned(
            config_of(tmp_path, f"train.fused_layers={choice}", *more, task=CAUSAL, **DECODERS),
            device="cuda",
        )
        for choice in ("on", "auto")
    )

    assert fused.part("student", "activations") < plain.part("student", "activations")
    assert fused.peak_bytes_per_rank < plain.peak_bytes_per_rank


@pytest.mark.parametrize(
    ("device", "sections"),
    [("cpu", {"task": CAUSAL, **DECODERS}), ("cuda", {"task": CAUSAL, **DECODERS}), ("cuda", {})],
)
def test_a_plan_has_plain_layers_unless_it_is_asked(tmp_path, device, sections):
    fused, plain = (
        planned(config_of(tmp_path, f"train.fused_layers={choice}", **sections), device=device)
        for choice in ("auto", "off")
    )

    assert fused.as_json() == plain.as_json()


def test_an_evaluation_that_is_the_peak_is_named_with_its_key(tmp_path):
    settings = ("eval.per_device_eval_batch_size=999", "student.deepspeed=zero0")
    plan = planned(config_of(tmp_path, *settings))
    assert "eval.per_device_eval_batch_size 999" in plan.as_json()["peak_moment"]
    assert "eval.per_device_eval_batch_size 999" in page(plan)


def test_an_evaluation_needs_no_more_than_training_where_no_batch_is_given(tmp_path):
    config = config_of(tmp_path)
    phases = planned_phases(PlannedWork(RunFacts(config, planned_sources(config), world=1)))

    traces = PhaseTraces(phases[0], config, "cuda")

    evaluation, training = (
        max(point.live for point in trace.points)
        for trace in (traces.evaluated["student"], traces.learner[0])
    )
    assert evaluation < training


def test_rates_turn_operations_and_bytes_into_the_least_and_the_most_seconds(tmp_path):
    config = config_of(tmp_path, "student.deepspeed=zero2", "teacher.deepspeed=teacher_zero3")
    rates: Any = {"tflops": 1e-3, "gbps": (1e-3, 1e-5)}
    on_one, on_two = (planned(config, ranks=4, nodes=nodes, **rates) for nodes in (1, 2))

    flops, within = trained(on_one).flops / 1e9, trained(on_one).sent.total() / 1e6
    # Of four ranks on two nodes, one of three others is on the same node.
    between = within / 3 + 100 * within * 2 / 3
    for one, network in ((on_one, within), (on_two, between)):
        seconds = one.as_json()["seconds_per_step"]
        assert seconds == pytest.approx((max(flops, network), flops + network))
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
    tmp_path, save, host, has_copy
):
    train = {"per_device_train_batch_size": 4, "max_steps": 4}
    config = config_of(tmp_path, save={"save_steps": 2} | save, train=train)
    plan = planned(config, device="cuda", device_memory=10**9, host_memory=host, ranks=2)
    most = next(phase.most for phase in plan.phases if phase.name == "student")

    # Both are the fp32 weights and two moments.
    optimizer = most[Share("student", "optimizer")]
    assert optimizer > 0
    assert most[Share("student", "checkpoint", "host")] == (optimizer if has_copy else 0)


def test_a_run_with_fine_tuning_needs_no_less_than_the_fine_tuning(tmp_path):
    model = {"model": bert(3, width=64, vocab_size=64)}
    alone = {"teacher": None, "student": model, "method": {"name": "finetune"}}
    whole, fine_tuning = (
        planned(config_of(tmp_path, **sections, save=AT_ONCE), device="cpu", ranks=2)
        for sections in ({"teacher": {**model, "finetune": {"max_steps": 2}}}, alone)
    )

    assert whole.highest.name == "teacher-finetune"
    assert whole.peak_bytes_per_rank == fine_tuning.peak_bytes_per_rank


FINETUNED = {"model": bert(3, width=32, vocab_size=64), "finetune": {"max_steps": 2}}
CUT = {"student": {"model": "from_teacher"}}


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        (
            {"teacher": FINETUNED, "baselines": ["alone"]},
            "teacher-finetune student alone student-scored alone-scored teacher-scored",
        ),
        ({}, "student student-scored teacher-scored"),
        # Importance is measured once.
        (
            {**CUT, "method": MINIDISC, "baselines": ["direct"]},
            "sorted-teacher trial-1 trial-2 direct trial-2-scored direct-scored trial-1-scored "
            "teacher-scored",
        ),
        (
            {**CUT, "method": {**MINIDISC, "name": "maxidisc"}},
            "sorted-teacher leg-sparsity-0.25 student-through-sparsity-0.25 leg-sparsity-0.5 "
            "student-through-sparsity-0.25-scored leg-sparsity-0.25-scored teacher-scored",
        ),
        (
            {**CUT, "method": {"name": "direct", "target_sparsity": 0.5, "round_to": 1}},
            "sorted-teacher student student-scored teacher-scored",
        ),
    ],
    ids=["fine-tuning", "single", "minidisc", "maxidisc", "direct"],
)
def test_every_phase_of_a_run_is_planned(tmp_path, sections, names):
    plan = planned(config_of(tmp_path, **sections))
    assert [phase.name for phase in plan.phases] == names.split()
    assert all(phase.peak.total for phase in plan.phases)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {**CUT, "method": MINIDISC},
            "sorted-teacher: 4 forwards of a rank for every 32 rows",
        ),
        (
            {"student": {"model": "from_teacher", "layers": 2}},
            f"layers: {(3 + 1) * 32} forwards of a rank",
        ),
    ],
)
def test_forwards_of_an_importance_are_counted_as_they_are_made(tmp_path, sections, line):
    config = config_of(tmp_path, "eval.per_device_eval_batch_size=4", **sections)
    assert line in page(planned(config, ranks=2))


RELATIONS = {"loss": "relation_kl", "relation_heads": 2, "relations": ["query", "query_key"]}


def test_what_a_loss_works_with_is_planned(tmp_path):
    plan = planned(config_of(tmp_path, objective=[RELATIONS]))
    assert plan.part("student", "activations") > 3 * (64 << 20)


def test_a_term_of_a_source_is_planned_over_texts_of_this_source(tmp_path):
    kl = {"loss": "soft_target_kl"}
    data, texts = ({**kl, "on": source} for source in ("data", "rollouts"))

    def of(terms: list[Any], mix: float) -> Plan:
        rollout = {"max_new_tokens": 8, "prompt_tokens": 4, "mix": mix}
        sections = {"task": CAUSAL, "objective": terms, "rollout": rollout, **DECODERS}
        return planned(config_of(tmp_path, **sections))

    whole, both, alone = of([kl], 0.5), of([data, texts], 0.5), of([texts], 1.0)

    # One row for the term of the other source.
    assert trained(both).flops == pytest.approx(trained(whole).flops, rel=2e-3)
    assert trained(alone).flops == trained(whole).flops
    assert both.peak_bytes_per_rank >= whole.peak_bytes_per_rank


def test_candidates_that_share_a_backward_hold_more_unless_blocks_are_repeated(tmp_path):
    def held(*overrides: str, together: int | None = None) -> int:
        method = {**MINIDISC, "passes_per_backward": together}
        plan = planned(config_of(tmp_path, *overrides, **CUT, method=method))
        return plan.part("student", "activations")

    shared = held()
    assert shared > 1.3 * held(together=1)
    assert held("train.gradient_checkpointing=true") < shared


def test_a_run_fits_if_a_gpu_has_its_peak_and_a_context(tmp_path):
    peak = planned(config_of(tmp_path)).peak_bytes_per_rank

    enough, small = (
        planned(config_of(tmp_path), device_memory=round((peak + context) / 0.95))
        for context in (1.6e9, 1.4e9)
    )

    assert (enough.fits, small.fits) == (True, False)
    assert "The run fits." in page(enough)
    assert "The run does not fit: 0.1" in page(small)


def test_a_run_on_cpus_fits_if_the_memory_of_its_node_holds_it(tmp_path):
    config, fits = config_of(tmp_path), {None: None, 1000: False, 10**15: True}

    result = {size: planned(config, device="cpu", ranks=2, host_memory=size).fits for size in fits}

    assert result == fits


def test_scores_of_all_pairs_of_tokens_are_planned_where_the_attention_has_them(tmp_path: Path):
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
def test_a_tokenizer_below_the_home_folder_is_counted(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / name).write_text(content)
    student = {"model": bert(2, width=16)}

    config = config_of(tmp_path, "task.tokenizer=~/words", student=student)

    assert planned_sources(config)["student"].config.vocab_size == 77


@pytest.mark.parametrize(
    "content", [None, "{", '{"model_type": "unheard-of"}', '{"model_type": "bert", "dtype": "x"}']
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    folder, name = tmp_path / "model", "README.md" if content is None else "config.json"
    folder.mkdir()
    (folder / name).write_text(content or "")
    # Before the network is asked.
    message = r"config\.json does not exist" if content is None else "^student.model: "
    with pytest.raises(ModelError, match=message):
        planned(config_of(tmp_path, student={"model": str(folder)}))


def test_rows_that_are_longer_than_the_context_of_a_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"max_length is 4096 and the model takes at most \d+ tok"):
        planned(config_of(tmp_path, "task.max_length=4096"))


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "enct5"])
def test_one_of_three_layers_takes_a_third_of_the_time_also_beside_a_decoder(family, tmp_path):
    folder = tiny_cuts.saved(tiny_cuts.build(family), tmp_path)
    source = tiny_cuts.source_of(folder, "classification")
    config = cast("Any", SimpleNamespace(task=tiny_cuts.task()))
    pruning = PlannedWork(RunFacts(config, {}, world=1))
    units = source.architecture.units(source.config)
    kept = {"layers": (1,), "width": None}
    for kind in ("heads", "neurons"):
        first, _, _, *others = getattr(units, kind)
        kept[kind] = (first, 0, 0, *others)

    times = pruning.times(source, {"one": View(**kept)}, "times")

    assert times["one"] == pytest.approx(1 / 3, abs=0.03)


def test_a_quantized_teacher_is_whole_on_every_rank_with_the_bytes_of_its_files(tmp_path):
    keys = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    teacher = LlamaConfig(**keys, intermediate_size=64, tie_word_embeddings=True)
    teacher.quantization_config = {"quant_method": "gptq", "bits": 4}
    teacher.save_pretrained(tmp_path / "teacher")
    count = 3 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    models = {**DECODERS, "teacher": {"model": str(tmp_path / "teacher")}, "task": CAUSAL}

    def weights(ranks: int, preset: str = "teacher_zero0") -> int:
        config = config_of(tmp_path, f"teacher.deepspeed={preset}", **models)
        return planned(config, ranks=ranks).part("teacher", "weights")

    assert weights(2) == count / 2 + 64 * 32 * 2  # the embeddings stay in 16 bits
    (tmp_path / "teacher" / "model.safetensors").write_bytes(bytes(12345))
    assert weights(3) == 12345
    with pytest.raises(ModelError, match=r"\(gptq\), and ZeRO 3 cannot share its weights"):
        weights(2, "teacher_zero3")


# The options of `megakd plan`.


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[RunConfig, Cluster]]:
    """The configs and machines that plans were asked for, in place of the plans."""
    asked: list[tuple[RunConfig, Cluster]] = []

    def plan_run(config: RunConfig, cluster: Cluster) -> Any:
        asked.append((config, cluster))
        return SimpleNamespace(as_json=lambda: {"ranks": cluster.ranks})

    monkeypatch.setattr(plan, "plan_run", plan_run)
    monkeypatch.setattr(plan, "page", lambda of: f"a page: {of.as_json()}")
    return asked


def test_plan_takes_the_machines_from_its_options(asked, run_file, capsys):
    words = ["--nodes", "2", "--gpu_memory_gb", "141", "--json", "train.max_steps=3"]

    code = cli.main(["plan", str(run_file), *words])

    config, cluster = asked[0]
    assert code == 0
    assert config.train.max_steps == 3
    assert (cluster.ranks, cluster.nodes, cluster.device) == (16, 2, "cuda")
    assert cluster.device_memory == 141 * 10**9
    assert capsys.readouterr().out == '{\n  "ranks": 16\n}\n'


@pytest.mark.parametrize(("text", "rates"), [("400,45", (400, 45)), ("45", (45, 45))])
def test_one_rate_of_the_network_or_two_are_given(asked, run_file, text, rates):
    assert cli.main(["plan", str(run_file), "--tflops", "300", "--gbps", text]) == 0
    assert (asked[0][1].tflops, asked[0][1].gbps) == (300, rates)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ranks 3 --nodes 2", "3 ranks cannot be divided equally between 2 nodes"),
        ("--gpu_memory_gb 0", "--gpu_memory_gb must be a finite number above 0"),
        ("--host_memory_gb inf", "--host_memory_gb must be a finite number above 0"),
        ("--nodes 0 --ranks 1", "--nodes must be a finite number above 0, got 0"),
        ("--device cpu --gpu_memory_gb 80", "cannot be used with --device cpu"),
        ("--tflops -1", "--tflops must be a finite number above 0, got -1"),
        ("--gbps 400,0", "--gbps must be a finite number above 0, got 0"),
        ("--gbps fast", "--gbps must be one or two numbers as in 400,45, got fast"),
    ],
)
def test_machines_that_cannot_be_are_refused(asked, run_file, words, message, capsys):
    assert cli.main(["plan", str(run_file), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert asked == []
