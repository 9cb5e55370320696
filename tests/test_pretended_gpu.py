"""Every phase of runs on a pretended GPU: no tensor of the CPU meets one of the GPU, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_families import FAMILIES
from pretend_cuda import CUDA, SYNCS, moved_to_cuda, pretended_cuda
from tiny_runs import NO_DROPOUT, config_tree, write_config
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megakd.config.file import load_config
from megakd.config.terms import TERMS
from megakd.data.batch import Batch, Documents, LossInputs, Outputs, backward_groups, copied_to
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.knowledge_selection.selecting import Selecting, Selector
from megakd.models import packing
from megakd.models.packing import set_attention
from megakd.reports import plan_tracing as tracing
from megakd.reports.plan_phases import PlannedWork, planned_phases, planned_sources
from megakd.reports.plan_tracing import PhaseTraces, Trace, _ones
from megakd.stage import Stage
from megakd.training.facts import RunFacts
from megakd_kernels import chunking

# The elastic embedding recognises tokens by their memory, which pretended tensors do not have.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
NO_TRACE = Trace()
LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 4, 300


class OnGpu(PhaseTraces):
    """Runs the forwards of a phase on the pretended GPU; the losses form their gradients there."""

    def _forward(self, module: nn.Module, *args: Any, **options: Any) -> tuple[Trace, Any]:
        with torch.no_grad():
            return NO_TRACE, module(*args, **options)

    def _learner(
        self, stage: Stage, bundle: Any, batch: Batch, knowledge: Mapping[str, Outputs]
    ) -> list[Trace]:
        passes = [replace(one, weigh=None) for one in stage.strategy.passes(0)]
        for group in backward_groups(passes):
            losses = bundle(batch, knowledge, group, _ones(bundle))
            assert losses.total.device == CUDA
            assert losses.total.requires_grad
        return []

    def _bundle(self, *arguments: Any) -> Any:
        return self._moved(super()._bundle, *arguments)

    def _frozen(self, *arguments: Any) -> Any:
        return self._moved(super()._frozen, *arguments)

    def _moved(self, build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
        """Return a module that is built without a device and then moved, as in a run."""
        with pytest.MonkeyPatch.context() as patch, unset_fake_temporarily():
            patch.setattr(tracing, "VALUELESS", torch.device("meta"))
            module = build(*arguments)
        return moved_to_cuda(module)

    def _model(self, source: Any, dtype: Any, fused: Any) -> Any:
        model = super()._model(source, dtype, fused)
        set_attention(model, source, self._task.type, CUDA)
        return model

    def _batch(self, rows: int, length: int | None = None) -> Batch:
        batch = super()._batch(rows, length)
        if self._task.type != "causal_lm":
            return batch
        row = batch.valid.shape[1]
        starts = torch.arange(0, rows * row + 1, row // 2, dtype=torch.int32, device=CUDA)
        return batch._replace(documents=Documents(starts, row // 2))


@pytest.fixture
def run_on_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Mapping[str, Any]], list[str]]]:
    """Function that runs all phases of a config, and returns the names of the phases."""
    monkeypatch.setattr(tracing, "VALUELESS", CUDA)
    # The importance of units is the gradient of gates, and a backward needs a real GPU.
    monkeypatch.setattr(torch.autograd, "grad", lambda _, tensors: [t.detach() for t in tensors])

    def run(tree: Mapping[str, Any]) -> list[str]:
        config = load_config(write_config(tmp_path / "run.yaml", tree), [])
        phases = planned_phases(PlannedWork(RunFacts(config, planned_sources(config), world=1)))
        for phase in phases:
            with pretended_cuda():
                OnGpu(phase, config, "cuda")
        return [phase.name for phase in phases]

    return run


def tree_of(folder: Path, task: str, student: Any, method: Any, **sections: Any) -> dict[str, Any]:
    models = {"student": {"model": student}, "method": method, **sections}
    data = {"type": task, "dataset": "anything"}
    return config_tree(folder / "out", data, train={"max_steps": 8}, **models)


ENCODERS = ("bert", "roberta", "electra", "distilbert")
MIXTURES = ("gpt_oss", "qwen3_moe")
DECODERS = (
    *(name for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks),
    *("phi3", *MIXTURES),
)
CLASSIFIERS = (*ENCODERS, "t5_encoder", "enct5")
GROUPED, T5 = {"num_key_value_heads": 2}, {"d_kv": 8, "dropout_rate": 0.0}
WIDE = {**GROUPED, "head_dim": 8}  # as torch's attention needs it
# No dropout, and few experts.
OWN_KEYS = {
    **dict.fromkeys(DECODERS, GROUPED),
    **dict.fromkeys(("bert", "roberta", "electra"), NO_DROPOUT),
    **dict.fromkeys(("t5_encoder", "enct5"), T5),
    **dict.fromkeys(("gemma2", "gemma3_text"), WIDE),
    "distilbert": dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0),
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "phi3": {**GROUPED, "pad_token_id": 0},
    "gpt_oss": {**WIDE, "num_local_experts": 4},
    "qwen3_moe": {
        **GROUPED,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
OF_SCORES = ("hard_mse", "soft_target_mse")


def model(family: str, layers: int = LAYERS, width: int = WIDTH) -> dict[str, Any]:
    """The config of a tiny model."""
    entry = FAMILIES.get(family, FAMILIES["llama"])
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": HEADS}
    keys = {"model_type": family, "vocab_size": VOCABULARY, **sizes, entry.neurons: 32}
    return {"config": {**keys, **OWN_KEYS[family]}}


def losses_of(task: str) -> list[dict[str, Any]]:
    """All terms of a task."""
    return [
        {"loss": name}
        for name in TERMS.names()
        if not name.startswith(("hard", "soft")) or (name in OF_SCORES) == (task == "regression")
    ]


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "classification") for family in CLASSIFIERS),
        ("bert", "regression"),
        *((family, "mlm") for family in ENCODERS),
        *((family, "causal_lm") for family in DECODERS),
    ],
)
def test_every_family_and_loss_stays_on_the_gpu(run_on_gpu, tmp_path, family, task):
    student = model("llama" if family in MIXTURES else family, width=16)
    teacher, method = {"model": model(family, layers=4)}, {"name": "single"}
    losses = {"objective": losses_of(task)}

    assert "student" in run_on_gpu(
        tree_of(tmp_path, task, student, method, teacher=teacher, **losses)
    )


POOL = [{"name": f"of_{layers}", "model": model("bert", layers=layers)} for layers in (4, 3)]
CUT = {"target_sparsity": 0.5, "sparsities": [0.25, 0.5]}
OWN = {"name": "mixed_vocabulary", "student_vocabulary": 200}
HOMODISTIL = {"name": "homodistil", "target_width": 16, "cuts": 2, "pruning_end": 6}
METHODS = {
    "finetune": ("classification", {"name": "finetune"}),
    "direct": ("classification", {"name": "direct", "target_sparsity": 0.5}),
    "minidisc": ("classification", {"name": "minidisc", **CUT}),
    "maxidisc": ("classification", {"name": "maxidisc", **CUT}),
    "minidisc_lm": ("causal_lm", {"name": "minidisc", **CUT}),
    "homodistil": ("mlm", HOMODISTIL),
    **{way: ("mlm", {**OWN, "projections": way}) for way in ("down", "up", "dual")},
    "mean_of_teachers": ("classification", {"name": "mean_of_teachers"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stays_on_the_gpu(run_on_gpu, tmp_path, name):
    task, method = METHODS[name]
    family = "llama" if task == "causal_lm" else "bert"
    teachers = {"teacher": {"model": model(family)}}
    if name in ("mean_of_teachers", "finetune"):
        teachers = {"teachers": POOL} if name == "mean_of_teachers" else {}
    student = "from_teacher" if "target_sparsity" in method or name == "homodistil" else None
    student = student or model(family, width=16)
    if method["name"] == "mixed_vocabulary":
        del student["config"]["vocab_size"]

    assert run_on_gpu(tree_of(tmp_path, task, student, method, **teachers))


@pytest.mark.usefixtures("process_group")
def test_knowledge_selection_reads_its_action_on_the_host():
    """The intended wait: the host has to know which losses of a step count."""
    config = KnowledgeSelectionConfig(name="knowledge_selection")
    strategy = Selecting("teacher", Selector((2, 3), ("labels", "responses")), config, seed=1)
    with pretended_cuda():
        answers = [Outputs(hidden_states=(torch.zeros(4, 5, n, device=CUDA),)) for n in (2, 3)]
        batch = Batch({}, torch.zeros(4, device=CUDA), torch.ones(4, 5, device=CUDA) > 0)
        reading = LossInputs(answers[0], answers[1], batch, {}, {})

        with pytest.raises(SYNCS) as raised:
            strategy.weigh(0, reading)

    assert {"weigh", "_chosen"} <= {entry.name for entry in raised.traceback}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda hidden: hidden + torch.zeros(hidden.shape),
        lambda hidden: hidden * hidden.sum().item(),
        lambda hidden: hidden[hidden.sum(-1) > 0],
        lambda hidden: hidden if hidden.sum() > 0 else -hidden,
    ],
    ids=["device", "item", "shape", "branch"],
)
def test_the_pretended_gpu_notices_mistakes(mistake):
    with pretended_cuda():
        hidden = torch.zeros(2, 3, device=CUDA)
        with pytest.raises(RuntimeError):  # also what a device mismatch is, under every torch
            mistake(hidden)


def test_heads_in_fp16_are_multiplied_as_they_are(monkeypatch):
    """Gradients in fp16 would underflow, so only products with hidden states are narrow."""
    monkeypatch.setattr(chunking, "_has_wide_results", lambda *_: True)
    products = []

    def noted(left, right, *, out, out_dtype=None):
        products.append((left.dtype, right.dtype, out_dtype))
        return out

    monkeypatch.setattr(chunking.torch, "mm", noted)
    with pretended_cuda():
        hidden, weight = (torch.zeros(4, 8, dtype=torch.float16, device=CUDA) for _ in range(2))
        rows = chunking.masked_rows(hidden, torch.ones(4, device=CUDA) > 0, torch.float32)
        chunking.project_into(torch.zeros(4, 4, device=CUDA), rows, weight, None)

        assert rows.dtype == torch.float16
        assert products == [(torch.float16, torch.float16, torch.float32)]
        assert chunking.gradient_dtype(hidden, torch.float32) == torch.float32


def test_attention_of_torch_2_11_gets_as_many_keys_as_queries(monkeypatch):
    def varlen_attn_of_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert query.shape == key.shape == value.shape
        return torch.empty_like(query)

    monkeypatch.setattr(packing, "varlen_attn", varlen_attn_of_2_11)
    monkeypatch.setattr(packing, "_GROUPS_QUERIES", False)
    with pretended_cuda():
        query, key = torch.zeros(2, 6, 5, 8, device=CUDA), torch.zeros(2, 2, 5, 8, device=CUDA)
        out, _ = packing.attend(nn.Identity(), query, key, key, None)

        assert out.shape == (2, 5, 6, 8)


def test_an_expanded_tensor_is_copied_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        with unset_fake_temporarily():
            return torch.empty_strided(tensor.size(), tensor.stride()).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    places = torch.arange(3).expand(2, -1)
    with pretended_cuda():
        assert copied_to(places, CUDA).shape == (2, 3)
