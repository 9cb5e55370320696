"""Promises of the benchmark: its lists, refusals, counts, files and comparisons."""

from __future__ import annotations

import ast
import importlib
import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

KERNELS = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(KERNELS))


def bench(name):
    return importlib.import_module(f"bench.{name}")


def smoke(**changes):
    cases = bench("cases")
    case = next(each for each in cases.cases_for("cpu") if each.name == "smoke")
    return replace(case, **changes)


def problem_of(case, dtype=None):
    problem = bench("problem").make_problem(case, CPU)
    return problem if dtype is None else problem.to(dtype)


def solve(name, problem):
    module = bench("problem")
    module.drop_gradients(problem)
    loss = module.run(bench("peers").load(name, problem.case), problem)
    return [loss, *(leaf.grad for leaf in problem.leaves)]


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench("__main__").main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


class TestCommandLine:
    def test_the_list_names_every_case_and_peer_without_loading_torch(self):
        program = (
            "import sys; from bench.__main__ import main; status = main(['--list']);"
            "print('loaded torch:', 'torch' in sys.modules); sys.exit(status)"
        )

        shown = subprocess.run(
            [sys.executable, "-c", program], cwd=KERNELS, capture_output=True, text=True, check=True
        )

        cases, catalogue = bench("cases"), bench("catalogue")
        names = [case.name for each in ("cpu", "cuda") for case in cases.cases_for(each)]
        names += [each.name for each in catalogue.IMPLEMENTATIONS]
        words = shown.stdout.split()
        assert [name for name in names if name not in words] == []
        assert "loaded torch: False" in shown.stdout

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--case", "forward_kll"], "there is no case 'forward_kll'; the nearest is 'forward"),
            (["--impl", "egaer"], "there is no implementation 'egaer'; the nearest is 'eager'"),
            (["--case", "%"], "there is no case '%'; --list shows them"),
            (["--case", "rows", "--device", "cpu"], "there is no case 'rows' on cpu"),
            (["--threads", "0"], "'0' is no number of threads"),
            (["--threads", "many"], "'many' is no number of threads"),
            (["--device", "gpu"], "invalid choice: 'gpu'"),
            (["--quik"], "unrecognized arguments: --quik"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_a_bad_option_gets_one_clear_line(self, arguments, words, capsys):
        message = refusal(arguments, capsys)

        assert words in message
        assert message.count("\n") == 1

    def test_a_tiny_case_goes_through_to_rows_with_every_column(
        self, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setitem(bench("machine")._GEMM_WIDTH, "cpu", 128)
        monkeypatch.setitem(bench("machine")._COPIED_BYTES, "cpu", 1_000_000)
        wanted = ["megakd-chunked", "liger-jsd"]
        options = [word for name in wanted for word in ("--impl", name)]

        status = bench("__main__").main(
            ["--quick", "--case", "smoke", *options, "--device", "cpu", "--out", str(tmp_path)]
        )

        (path,) = tmp_path.glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        columns = [field.name for field in fields(bench("results").Result)]
        assert status == 0
        assert all(list(row) == columns for row in rows)
        by_name = {row["impl"]: row for row in rows}
        assert by_name.keys() == {"matmul", "copy", *wanted}
        assert by_name["liger-jsd"]["reason"] == "runs on CUDA alone"
        ours = by_name["megakd-chunked"]
        assert 0 < ours["ms_p20"] <= ours["ms_median"] <= ours["ms_p80"]
        assert ours["loss_relerr"] < 1e-5
        assert ours["dx_relerr"] < 2e-5
        assert ours["dw_relerr"] < 2e-5
        assert ours["peak_method"]
        last = capsys.readouterr().out.splitlines()[-2:]
        assert [line.endswith("not measured") for line in last] == [True, True]


class TestPeers:
    @pytest.mark.parametrize(
        "changes",
        [
            *({"mixture": ((name, 1.0),)} for name in (
                "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd")),
            {"temperature": 2.5},
            {"mixture": (("forward_kl", 0.5), ("reverse_kl", 0.25)), "ce_weight": 2.0},
            {"mode": "fwd"},
            {"kind": "linear_ce", "mixture": (), "ce_weight": 1.0, "ht": 0},
            {"kind": "linear_stats", "mode": "fwd"},
            {"kind": "topk", "ht": 0},
            {"kind": "logits"},
            {"kind": "hidden_mse", "v": 0},
            {"kind": "hidden_cosine", "v": 0},
            {"kind": "relation", "v": 0, "heads": 2},
        ],
        ids=str,
    )  # fmt: skip
    def test_our_losses_mean_what_the_eager_ones_do(self, changes):
        case = smoke(**changes)
        truth = bench("accuracy").Truth(problem_of(case))

        errors = truth.errors(bench("peers").load("megakd-chunked", case))

        assert [error for error in errors if error is not None and not error < 2e-5] == []
        assert (errors.dx is None) == (case.mode == "fwd")

    # The interpreter's own arithmetic with -inf.
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_the_row_kernel_alone_gives_the_eager_loss_and_keeps_its_logits(self):
        pytest.importorskip("triton")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        case = smoke(kind="rows", n=8)
        problem = bench("problem").make_problem(case, device)
        before = problem.student.clone()

        errors = bench("accuracy").Truth(problem).errors(bench("peers").load("megakd-triton", case))

        assert errors.loss < 1e-5
        assert torch.equal(problem.student, before)

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_checkpointed_chunks_give_the_eager_loss_and_gradients(
        self, name, monkeypatch, distance
    ):
        monkeypatch.setattr(bench("eager"), "TRL_ROWS", 7)
        problem = problem_of(smoke(mixture=((name, 1.0),), temperature=1.5))

        chunks, whole = solve("trl-chunks", problem), solve("eager", problem)

        assert max(distance(*pair) for pair in zip(chunks, whole, strict=True)) < 1e-5

    @pytest.mark.parametrize(
        ("name", "changes", "device", "reason"),
        [
            ("liger-jsd", {}, "cpu", "runs on CUDA alone"),
            ("trl-chunks", {}, "cuda", "on a CPU alone"),
            ("trl-chunks", {"mixture": (("tvd", 1.0),)}, "cpu", "has no tvd"),
            ("trl-chunks", {"ce_weight": 1.0}, "cpu", "computes no weighted sum"),
            ("eager", {}, "cpu", None),
        ],
    )
    def test_who_cannot_compute_a_case_says_why(self, name, changes, device, reason):
        catalogue = bench("catalogue")

        message = catalogue.reason_to_skip(catalogue.find(name), smoke(**changes), device)

        assert message is None if reason is None else reason in message


class TestMeasuring:
    def test_an_error_of_one_percent_is_seen_in_loss_and_gradients(self):
        problem = problem_of(smoke())
        loss = bench("peers").load("eager", problem.case)

        errors = bench("accuracy").Truth(problem).errors(lambda given: 1.01 * loss(given))

        assert errors == pytest.approx((0.01, 0.01, 0.01), rel=1e-3)

    def test_a_known_allocation_is_seen_in_the_peak_of_memory(self):
        program = (
            "import torch\nfrom bench.memory import peak_in_process\n"
            "def step():\n    torch.ones(16_000_000)\n"
            "print(peak_in_process(step).bytes_)"
        )

        shown = subprocess.run(
            [sys.executable, "-c", program], cwd=KERNELS, capture_output=True, text=True, check=True
        )

        assert 64e6 <= int(shown.stdout) < 72e6

    def test_the_products_alone_are_as_many_as_those_of_the_loss(self, monkeypatch):
        monkeypatch.setattr("megakd_kernels.chunking.CPU_CHUNK_MB", 0.01)
        case = smoke(kind="gemms", n=30)
        problem = problem_of(case)

        added = {torch.ops.aten.addmm_: lambda _, a, b, **others: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=added) as counted:
            bench("peers").load("megakd-chunked", case)(problem)

        assert counted.get_total_flops() == bench("cases").floating_point_operations(case)

    @pytest.mark.parametrize(
        ("error", "status"),
        [(ImportError("no such package"), "skipped"), (RuntimeError("boom\nmore"), "failed")],
    )
    def test_who_raises_gets_a_row_with_the_first_line(self, error, status, monkeypatch):
        running, results, machine = bench("running"), bench("results"), bench("machine")

        def load(name, case):
            raise error

        monkeypatch.setattr(running, "load", load)
        times = bench("timing").Times(1.0, 1.0, 1.0, 0.0)
        ledger = results.Ledger(
            io.StringIO(), machine.describe(CPU), machine.Ceilings(1e9, 1e9, times, times)
        )
        plan = running.Plan(device=CPU, effort=bench("timing").Effort(0.0, 2))

        running.run_cases(
            [smoke()], (bench("catalogue").find("eager"),), plan, ledger, announce=lambda _: None
        )

        (row,) = ledger.rows
        assert row.status == status
        assert row.reason == f"{type(error).__name__}: {str(error).splitlines()[0]}"


class TestTargets:
    @pytest.mark.parametrize(
        ("ours_ms", "ours_mb", "expected"),
        [(8.0, 15.0, (True, True)), (8.1, 15.1, (False, False)), (None, None, (None, None))],
        ids=["both hold", "neither holds", "not measured"],
    )
    def test_the_cpu_targets_compare_both_sides_of_one_run(self, ours_ms, ours_mb, expected):
        rows = [self.row("eager", 10.0, 100.0)]
        if ours_ms is not None:
            rows.append(self.row("megakd-chunked", ours_ms, ours_mb))

        verdicts = bench("targets").verdicts(rows, "cpu")

        assert tuple(each.holds for each in verdicts) == expected

    def test_every_target_of_a_gpu_names_cases_and_implementations_that_are_run(self):
        cases, catalogue = bench("cases"), bench("catalogue")
        names = {case.name: case for case in cases.cases_for("cuda")}

        for target in bench("targets")._TARGETS["cuda"]:
            for name in filter(None, (target.over, target.under)):
                implementation = catalogue.find(name)
                case = names[target.case]
                assert catalogue.computes(implementation, case)
                assert implementation.only != "cpu"

    def row(self, impl, milliseconds, megabytes):
        results, case = bench("results"), smoke(name=bench("cases").ACCEPTANCE)
        return results.Result(
            case=case.name, impl=impl, status="measured", dtype="fp32",
            N=1, V=1, Hs=1, Ht=1, divergence="forward_kl", temperature=1.0, mode="fwd_bwd",
            ms_median=milliseconds, peak_mb=megabytes, device="", threads=1,
            torch="", triton="", commit="",
        )  # fmt: skip


def test_the_benchmark_imports_this_package_torch_and_optional_tools_alone():
    allowed = {"bench", "megakd_kernels", "torch", "triton", "matplotlib"}
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (KERNELS / "bench").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    one = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    one |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}

    assert {name.split(".")[0] for name in one} - allowed - sys.stdlib_module_names == set()
