"""Arguments that cannot be used are refused by name, and the implementation is chosen."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import megakd_kernels as mk
from megakd_kernels import linear_kd, settings
from megakd_kernels.settings import resolve_implementation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LEARNED = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "tvd2"}, "unknown divergence 'tvd2'; known: forward_kl, reverse_kl, jsd"),
        ({"divergence": {"kl": 1.0}}, "unknown divergence 'kl'"),
        ({"divergence": {}}, "divergence is empty; name a divergence"),
        ({"divergence": {"tvd": LEARNED}}, "tvd requires grad, and the loss has no gradient for"),
        ({"kd_weight": LEARNED}, "kd_weight requires grad"),
        ({"ce_weight": LEARNED, "labels": torch.zeros(4).long()}, "ce_weight requires grad"),
        ({"reduction": "num_items", "num_items": LEARNED}, "num_items requires grad"),
        ({"student_weight": torch.ones(7, 3, device="meta")}, "student_weight on meta; move them"),
        ({"teacher_hidden": torch.ones(4, 2, device="meta")}, "on cpu and teacher_weight|on meta"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"skew": 1.0}, r"skew must lie in \[0, 1\), got 1.0"),
        ({"softcap_s": 0.0}, "softcap_s must be above 0 and finite or None, got 0.0"),
        ({"logit_scale_t": -1.0}, "logit_scale_t must be above 0 and finite, got -1.0"),
        ({"divergence": {"tvd": float("nan")}}, "the weight of tvd must be finite, got nan"),
        ({"chunk_mb": 0}, "chunk_mb must be above 0, got 0"),
        ({"reduction": "batchmean"}, "unknown reduction 'batchmean'; known: sum, mean"),
        ({"reduction": "num_items"}, "reduction 'num_items' needs num_items"),
        ({"num_items": 3}, "reduction 'sum' with num_items 3"),
        ({"reduction": "num_items", "num_items": 0}, "num_items must be above 0, got 0"),
        ({"reduction": "none"}, "reduction 'none' has no gradient"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; known: auto, triton, chunked, reference"),
        ({"vocab_size": 6}, "vocab_size 6 must lie in 1..5: the student has 7 ids and the te"),
        ({"vocab_size": 0}, "vocab_size 0 must lie in 1..5"),
        ({"ce_weight": 1.0}, "ce_weight is 1.0 but labels is None"),
        ({"labels": torch.zeros(3)}, r"labels is \[3\]; it must be \[4\], one entry per"),
        ({"token_weight": torch.ones(5)}, r"token_weight is \[5\]; it must be \[4\]"),
        ({"student_bias": torch.ones(5)}, r"student_bias is \[5\]; it must be \[7\]"),
        ({"teacher_bias": torch.ones(7)}, r"teacher_bias is \[7\]; it must be \[5\]"),
        ({"teacher_hidden": None}, "teacher_hidden and teacher_weight must be given together"),
        ({"teacher_hidden": torch.ones(3, 2)}, r"hidden is \[4, 3\] .* teacher_hidden \[3, 2\]"),
        ({"teacher_hidden": torch.ones(4, 3)}, r"teacher_hidden is \[4, 3\] and teacher_weight"),
        ({"student_weight": torch.ones(7, 2)}, r"student_hidden is \[4, 3\] and student_weight"),
        ({"teacher_hidden": None, "teacher_weight": None}, "without a teacher, cross-entropy"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_refused_with_both_values(options, message):
    arguments = {
        "student_hidden": torch.ones(4, 3, requires_grad=True),
        "student_weight": torch.ones(7, 3),
        "teacher_hidden": torch.ones(4, 2),
        "teacher_weight": torch.ones(5, 2),
    }

    with pytest.raises(ValueError, match=message):
        mk.linear_kd_loss(**(arguments | {"t_squared": True} | options))


def test_logits_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="only the last dimension may differ"):
        mk.kd_loss_from_logits(torch.ones(3, 2), torch.ones(4, 2), t_squared=True)


def test_t_squared_must_be_said():
    with pytest.raises(TypeError, match="t_squared"):
        mk.kd_loss_from_logits(torch.ones(3, 2), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("impl", "environment", "expected"),
    [
        ("auto", None, "chunked"),
        ("auto", "", "chunked"),
        ("auto", "reference", "reference"),
        ("chunked", "reference", "chunked"),
        ("reference", None, "reference"),
    ],
)
def test_the_environment_overrides_auto_alone(monkeypatch, impl, environment, expected):
    monkeypatch.delenv("MEGAKD_KERNELS", raising=False)
    if environment is not None:
        monkeypatch.setenv("MEGAKD_KERNELS", environment)

    assert resolve_implementation(impl, CPU) == expected


@pytest.fixture
def card(monkeypatch):
    """Properties of a GPU that is not there."""
    card = SimpleNamespace(
        name="Card", major=9, minor=0, shared_memory_per_block_optin=227 << 10,
    )  # fmt: skip
    monkeypatch.delenv("MEGAKD_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(settings, "HAS_TRITON", True)
    monkeypatch.setattr(settings, "_FITS", {})
    return card


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        (
            {"major": 7, "minor": 5},
            r"cuda \(Card\) has compute capability 7.5; the kernels need 8.0",
        ),
        (
            {"shared_memory_per_block_optin": 64 << 10},
            r"cuda \(Card\) has 64 KiB of shared memory; the kernels need 96",
        ),
        ({"hip": "7.0"}, "cuda is no GPU of NVIDIA, for which the kernels are written"),
    ],
    ids=["capability", "shared memory", "maker"],
)
def test_a_gpu_that_cannot_run_the_kernels_takes_chunks(card, lacks, message, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", lacks.get("hip"))
    vars(card).update(lacks)

    with pytest.warns(UserWarning, match=rf"in plain torch \('chunked'\): {message}"):
        assert resolve_implementation("auto", CUDA) == "chunked"
    with pytest.raises(ValueError, match=f"impl 'triton': {message}; use 'chunked'"):
        resolve_implementation("triton", CUDA)
    assert resolve_implementation("auto", CUDA) == "chunked"  # warned once


def test_a_compiled_function_takes_the_path_of_an_eager_one():
    @torch.compile(fullgraph=True, backend="eager")
    def with_path(x):
        return x, resolve_implementation("auto", CUDA)

    assert with_path(torch.ones(2))[1] == resolve_implementation("auto", CUDA)


def test_an_old_torch_is_refused_at_the_import(monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0+cpu"))
    monkeypatch.delitem(sys.modules, "megakd_kernels")

    with pytest.raises(
        ImportError, match=r"megakd_kernels needs torch 2\.11 or newer, got 2\.10\.0\+cpu"
    ):
        importlib.import_module("megakd_kernels")


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MEGAKD_KERNELS", "fused")

    with pytest.raises(ValueError, match="unknown MEGAKD_KERNELS 'fused'; known: auto, triton"):
        resolve_implementation("auto", CPU)


def test_the_environment_decides_which_path_runs(monkeypatch):
    monkeypatch.setenv("MEGAKD_KERNELS", "reference")
    monkeypatch.setattr(linear_kd, "_formed", None)

    one = torch.ones(2, 2)

    assert mk.linear_kd_loss(one, one, one, one, t_squared=True).loss.item() == 0


def test_the_package_needs_torch_alone():
    # A module that is None in sys.modules cannot be imported.
    program = (
        "import sys, torch; sys.modules.update(dict.fromkeys(['megakd', 'deepspeed', 'triton',"
        " 'transformers'])); import megakd_kernels"
    )

    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr
