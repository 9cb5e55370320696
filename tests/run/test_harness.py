"""`megakd evaluate --tasks`: what lm-eval is asked, what is written, and what is refused."""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import save_tokenizer, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from megakd import cli
from megakd.run.harness import result_entries

SAID = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": 0.125,
            "exact_match,flexible": 0.5,
            "exact_match_stderr,flexible": "N/A",
        },
        "wikitext": {"word_perplexity,none": 12.5},
    },
    "higher_is_better": {"gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False}},
    "n-shot": {"gsm8k": 5, "wikitext": 0},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 8}},
}
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" red", " blue"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class Harness(ModuleType):
    """Stands in for lm_eval: knows two tasks and notes what it is asked."""

    __version__ = "0.0"

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.asked: list[dict[str, Any]] = []
        self.folders: list[str | None] = []
        self.failure: Exception | None = None

    def simple_evaluate(self, **options: Any) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        self.asked.append(options)
        return SAID

    def manager(self, *, include_path: str | None) -> Any:
        self.folders.append(include_path)
        names = ["gsm8k", "gsm8k_cot", "wikitext"]

        def match(wanted: list[str]) -> list[str]:
            return [n for n in names if any(fnmatch(n, pattern) for pattern in wanted)]

        return SimpleNamespace(all_tasks=names, match_tasks=match)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    fake = Harness()
    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = fake.manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return fake


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The output_dir of a finished run, as far as it is read."""
    final = tmp_path / "out" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "out"


def test_the_student_of_a_run_is_scored_and_the_scores_lie_beside_the_report(
    harness, run_folder, capsys
):
    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k, wikitext"]) == 0

    asked = harness.asked[0]
    assert asked["model"] == "hf"
    assert asked["model_args"] == {
        "pretrained": str(run_folder / "final"), "trust_remote_code": False
    }  # fmt: skip
    assert asked["tasks"] == ["gsm8k", "wikitext"]
    written = json.loads((run_folder / "lm_eval.json").read_text())
    assert written["results"] == result_entries(SAID)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gsm8k", "exact_match", "↑", "strict", "0.2500", "0.1250", "5", "8"] in rows
    assert ["wikitext", "word_perplexity", "↓", "none", "12.5000", "-", "0", "-"] in rows


@pytest.mark.parametrize("given", ["out", "out/final", "run.yaml"])
def test_a_run_is_named_by_its_folder_its_student_or_its_config(
    harness, run_folder, tmp_path, given
):
    tree = {
        "output_dir": str(run_folder),
        "task": {"type": "classification", "dataset": "pydocs"},
        "student": {"model": "x"},
        "method": {"name": "finetune"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))

    assert cli.main(["evaluate", str(tmp_path / given), "--tasks", "gsm8k"]) == 0

    assert Path(harness.asked[0]["model_args"]["pretrained"]).samefile(run_folder / "final")
    assert (run_folder / "lm_eval.json").is_file()


def test_the_scores_of_another_model_lie_in_its_own_folder(harness, run_folder, tmp_path):
    model = (run_folder / "final").rename(tmp_path / "model")

    assert cli.main(["evaluate", "--model", str(model), "--tasks", "gsm8k"]) == 0

    assert (model / "lm_eval.json").is_file()


def test_options_are_passed_on_and_written(harness, run_folder, tmp_path, capsys):
    options = ["--limit", "8", "--include_path", str(tmp_path), "--apply_chat_template", "--json"]

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8*", *options]) == 0

    asked = harness.asked[0]
    assert (asked["limit"], asked["apply_chat_template"]) == (8, True)
    assert asked["tasks"] == ["gsm8k", "gsm8k_cot"]
    assert harness.folders == [str(tmp_path)]
    found = json.loads(capsys.readouterr().out)
    assert (found["limit"], found["chat_template"], found["lm_eval"]) == (8, True, "0.0")


def test_a_standard_error_that_is_not_known_is_null() -> None:
    entries = {(e["task"], e["filter"]): e for e in result_entries(SAID)}

    assert entries["gsm8k", "strict"]["stderr"] == 0.125
    assert entries["gsm8k", "flexible"]["stderr"] is None
    assert entries["wikitext", "none"] == {
        "task": "wikitext", "metric": "word_perplexity", "filter": "none", "value": 12.5,
        "stderr": None, "higher_is_better": False, "shots": 0, "rows": None,
    }  # fmt: skip
    assert len(entries) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "gsm9k"], 'lm-eval has no task "gsm9k"; did you mean "gsm8k"?'),
        (["--tasks", ","], "--tasks: no name is given"),
        (["--tasks", "gsm8k", "--data", "x.jsonl"], "--data cannot be combined with --tasks"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "gsm8k", "--include_path", "nowhere"], "--include_path nowhere: the folder"),
        (["--tasks", "gsm8k", "train.max_steps=3"], "settings apply to a config"),
        (["--limit", "3"], "--limit applies to --tasks alone"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_model_is_loaded(
    harness, run_folder, capsys, words, message
):
    assert cli.main(["evaluate", str(run_folder), *words]) == 2

    assert message in capsys.readouterr().err
    assert harness.asked == []
    assert not (run_folder / "lm_eval.json").exists()


def test_a_folder_without_a_model_is_refused(harness, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path), "--tasks", "gsm8k"]) == 2

    assert "final holds no model: config.json is missing" in capsys.readouterr().err


def test_several_ranks_are_refused(harness, run_folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k"]) == 2

    assert "--tasks runs in one process, and the launcher has started 2" in capsys.readouterr().err


def test_a_model_with_code_of_its_own_runs_only_on_request(harness, run_folder, capsys):
    from megakd.models.export import OWN_MODELS

    content = json.dumps({"model_type": next(iter(OWN_MODELS))})
    (run_folder / "final" / "config.json").write_text(content)

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k"]) == 2
    assert "add --trust_remote_code" in capsys.readouterr().err
    words = ["evaluate", str(run_folder), "--tasks", "gsm8k", "--trust_remote_code"]
    assert cli.main(words) == 0
    assert harness.asked[0]["model_args"]["trust_remote_code"] is True


def test_an_encoder_is_refused(harness, run_folder, capsys):
    content = json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    (run_folder / "final" / "config.json").write_text(content)

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k"]) == 2

    assert "final holds a BertForMaskedLM, and the tasks" in capsys.readouterr().err


def test_data_that_cannot_be_loaded_leaves_no_file(harness, run_folder, capsys):
    harness.failure = ConnectionError("the Hub cannot be reached")

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k"]) == 2

    message = "--tasks gsm8k: the data cannot be loaded: the Hub cannot be reached"
    assert message in capsys.readouterr().err
    assert not (run_folder / "lm_eval.json").exists()


def test_without_the_package_the_command_says_what_to_install(run_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    assert cli.main(["evaluate", str(run_folder), "--tasks", "gsm8k"]) == 2

    assert "--tasks needs the package lm-eval" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own_is_scored_by_lm_eval_itself(run_folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-eval, an optional package")
    torch.manual_seed(0)
    tokenizer = save_tokenizer(
        run_folder / "final", ["the sky is blue", "roses are red"], kind="bpe"
    )
    assert tokenizer == run_folder / "final"
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(run_folder / "final")
    rows = [{"question": "the sky is", "answer": 1}, {"question": "roses are", "answer": 0}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "colours.yaml").write_text(TASK.format(rows=path))

    words = ["evaluate", str(run_folder), "--tasks", "colours", "--include_path", str(tasks)]
    assert cli.main(words) == 0

    (entry,) = json.loads((run_folder / "lm_eval.json").read_text())["results"]
    assert (entry["task"], entry["metric"], entry["rows"]) == ("colours", "acc", 2)
    assert entry["value"] in {0.0, 0.5, 1.0}
    assert "colours" in capsys.readouterr().out
