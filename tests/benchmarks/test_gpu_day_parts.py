"""The parts of the first day on a GPU: valid runs, right counts, and a rehearsal on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_day  # noqa: E402
import gpu_day_agreement  # noqa: E402
import gpu_day_cases  # noqa: E402
import gpu_day_kernel_tests  # noqa: E402
import gpu_day_llama  # noqa: E402
import gpu_day_release  # noqa: E402
import gpu_day_runs  # noqa: E402
import gpu_day_variants  # noqa: E402
from gpu_day_parts import PARTS, Setting  # noqa: E402

MINUTES = 30
# Three starts of a longer run, and two parts that share their programs with others.
LONG = ("minidisc", "more-losses", "streams")
QUICK = [part.name for part in PARTS if part.name not in LONG]
JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1" time="2.5">
<testcase classname="kernels.tests.test_a" name="test_b[1]">
<failure message="one&#10;two"/></testcase>
<testcase classname="kernels.tests.test_a" name="test_c"><error message="broken"/></testcase>
<testcase classname="kernels.tests.test_a" name="test_d"/></testsuite></testsuites>"""


def parts_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]


def test_the_limits_of_all_parts_fit_into_the_time():
    assert sum(part.limit_s for part in PARTS) <= 60 * MINUTES
    assert gpu_day.parse([]).minutes == MINUTES


def test_correctness_comes_before_speed():
    names = [part.name for part in PARTS]

    assert names[:5] == ["kernel-tests", "agreement", "causal-lm", "minidisc", "release"]


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("one", PARTS, ids=lambda part: part.name)
def test_every_part_starts_a_program_of_the_repository(one, rehearse, tmp_path):
    command = one.command(Setting(tmp_path, rehearse))

    assert command[0] == sys.executable
    assert Path(command[2]).is_file()
    assert ("--rehearse" in command) == rehearse


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("name", ["causal_lm_tree", "minidisc_tree", "llama_tree"])
def test_every_run_is_a_valid_config(name, rehearse, tmp_path):
    tree = getattr(gpu_day_cases, name)(tmp_path, rehearse=rehearse)
    (tmp_path / "run.yaml").write_text(json.dumps(tree), encoding="utf-8")

    config = load_config(tmp_path / "run.yaml")

    assert (config.task.dataset == "pydocs") != rehearse


def test_the_profiled_llama_has_a_billion_weights(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tree = gpu_day_cases.llama_tree(tmp_path, rehearse=False)
    keys = {k: v for k, v in tree["student"]["model"]["config"].items() if k != "model_type"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**keys))

    assert model.num_parameters() == pytest.approx(1.24e9, rel=0.01)
    assert tree["task"]["max_length"] * tree["train"]["per_device_train_batch_size"] == 4 * 4096


def test_failures_are_listed_by_test_with_the_first_line_of_the_message(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(JUNIT, encoding="utf-8")

    assert gpu_day_kernel_tests.counts(report) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "seconds": 2.5,
    }
    assert gpu_day_kernel_tests.failed(report) == [
        {"test": "test_a::test_b[1]", "message": "one"},
        {"test": "test_a::test_c", "message": "broken"},
    ]


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        ({"triton loss": 1e-6, "triton dx": 1e-3, "triton dw": None}, True),
        ({"triton loss": 1e-3, "triton dx": 1e-3, "triton dw": 1e-3}, False),
        ({"triton loss": 1e-6, "triton dx": float("nan"), "triton dw": 1e-3}, False),
    ],
)
def test_an_error_that_is_large_or_no_number_does_not_hold(row, holds):
    assert gpu_day_agreement.is_small(row, "bf16") == holds


def test_weights_of_other_bits_are_found_with_their_difference(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name / "final").mkdir(parents=True)
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / name / "final/model.safetensors")

    found = gpu_day_runs.differences(tmp_path / "one", tmp_path / "other")

    assert found == {"same bits": False, "largest difference of a weight": 0.5}
    assert gpu_day_runs.differences(tmp_path / "one", tmp_path / "one")["same bits"]


def test_a_checkpoint_that_is_being_written_does_not_count(tmp_path):
    for name in ("step-10", "step-20.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()

    assert gpu_day_runs.newest_step(tmp_path) == 10
    assert gpu_day_runs.newest_step(tmp_path / "absent") == 0


@pytest.mark.parametrize(
    ("device", "left_mb", "models", "holds"),
    [("cuda", 10, 0, True), ("cuda", 500, 0, False), ("cuda", 10, 1, False), ("cpu", 500, 0, True)],
)
def test_memory_that_is_left_on_a_gpu_or_a_model_that_is_left_is_a_failure(
    device, left_mb, models, holds
):
    row = {"before": 100.0, "after collecting": 100.0 + left_mb, "models left": models}

    assert gpu_day_release.is_released([row], torch.device(device)) == holds


def test_a_setting_that_the_kernels_do_not_read_is_known():
    assert gpu_day_variants.is_read("chunk_mb")
    assert not gpu_day_variants.is_read("MEGAKD_NO_SUCH_SETTING")


def test_the_kernels_of_an_attention_are_found_by_name():
    names = ["void flash_fwd_kernel<…>", "aten::_varlen_attn", "ampere_gemm", "fmha_cutlassF"]

    assert [bool(gpu_day_llama.ATTENTION.search(name)) for name in names] == [1, 1, 0, 1]


def test_the_most_expensive_kernels_leave_the_operators_out_that_start_them():
    def event(key: str, device: str, spent: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=SimpleNamespace(name=device), self_device_time_total=spent
        )

    events = [event("aten::mm", "CPU", 900.0), event("gemm", "CUDA", 900.0)]
    events.append(event("softmax", "CUDA", 300.0))

    rows = gpu_day_llama.most_expensive(cast("Any", events), on_gpu=True)

    assert [row["kernel"] for row in rows] == ["gemm", "softmax"]
    assert [row["%"] for row in rows] == [75.0, 25.0]
    assert rows[0]["ms per step"] == pytest.approx(0.3)


class Rehearsed(NamedTuple):
    out: Path
    said: str


def rehearse(out: Path, parts: list[str]) -> str:
    """Run the command as a user does, and return what it prints."""
    words = ["--rehearse", "--out", str(out), "--parts", ",".join(parts)]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_day.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    tails = [f"{name}: {found['tail']}" for name, found in parts_of(out).items() if found["tail"]]
    assert done.returncode == 0, "\n".join([done.stderr, *tails])
    return done.stdout


@pytest.fixture(scope="module")
def rehearsed(built_operator: None, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    out = tmp_path_factory.mktemp("gpu-day")
    return Rehearsed(out, rehearse(out, QUICK))


def test_all_parts_of_a_rehearsal_finish_and_are_on_the_page(rehearsed):
    found = parts_of(rehearsed.out)

    assert [name for name in QUICK if found[name]["state"] != "finished"] == []
    page = (rehearsed.out / "page.md").read_text(encoding="utf-8")
    assert [name for name in QUICK if f"## {name}: finished" not in page] == []
    assert all(found[name]["numbers"] for name in QUICK)


def test_a_second_start_repeats_nothing(rehearsed):
    before = parts_of(rehearsed.out)

    said = rehearse(rehearsed.out, QUICK)

    assert said.count("has finished before") == len(QUICK)
    assert "at most" not in said
    assert parts_of(rehearsed.out) == before


def test_a_rehearsed_run_is_killed_after_half_of_its_steps_and_ends_with_the_same_bits(rehearsed):
    numbers = parts_of(rehearsed.out)["causal-lm"]["numbers"]

    assert 30 <= numbers["killed after step"] < 60
    assert numbers["same bits"]
    assert {leg["run"] for leg in numbers["seconds"]} == {"first", "killed", "resumed"}


def test_a_rehearsal_says_what_a_cpu_cannot_show(rehearsed):
    results = json.loads((rehearsed.out / "results.json").read_text(encoding="utf-8"))

    assert "without clocks" in results["machine"]["GPU"]
    assert "no CUDA kernels" in results["parts"]["llama"]["numbers"]["kernels"]
    assert results["parts"]["release"]["numbers"]["memory"] == "resident on the host, in MB"


def test_a_rehearsal_times_every_value_of_a_setting(rehearsed):
    times = parts_of(rehearsed.out)["stages"]["numbers"]["times"]

    assert [row["MEGAKD_ROW_STAGES"] for row in times] == ["1", "3"]
    assert all(row["ms"] > 0 for row in times)
    assert times[0]["loss"] == pytest.approx(times[1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_other_parts_can_be_rehearsed_too(built_operator, tmp_path):
    rehearse(tmp_path, [*LONG])

    found = parts_of(tmp_path)
    assert [found[name]["state"] for name in LONG] == ["finished"] * len(LONG)
    numbers = found["minidisc"]["numbers"]
    assert 20 <= numbers["killed after step"] < 40
    assert numbers["same bits"]
