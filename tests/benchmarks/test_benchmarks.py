"""The benchmarks' own parts: tiny sizes, and configs that megakd accepts."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402
import overhead  # noqa: E402
import overhead_case  # noqa: E402
import quickstart_seeds  # noqa: E402
import real_cases  # noqa: E402
import real_runs  # noqa: E402
import stories_tokenizer  # noqa: E402
import summary  # noqa: E402

MERGED = (" a", "b", " ab", "c", "bc", "a")


def report(*, distilled: float, alone: float, metric: str = "accuracy") -> dict:
    def model(value: float, parameters: int) -> dict:
        return {"parameters": parameters, "metrics": {metric: value}}

    return {
        "metric_name": metric,
        "evaluated_on": "test",
        "teacher": model(0.9, 800),
        "student": model(distilled, 100),
        "baselines": {"alone": {metric: alone}},
        "stages": [{"name": "student", "seconds": 12.0}, {"name": "alone", "seconds": 8.0}],
    }


def write_llama2c(path: Path, pieces: tuple[str, ...]) -> Path:
    """Begins as every such file does; of the pieces the first has the best score."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *bytes_, *pieces]
    content = struct.pack("<i", 7)
    for index, text in enumerate(texts):
        encoded = text.encode()
        content += struct.pack("<fi", -float(max(0, index - 259)), len(encoded)) + encoded
    path.write_bytes(content)
    return path


def test_a_spread_has_the_median_the_quartiles_and_an_interval_around_it():
    spread = machine.spread_of([1.0, 2.0, 3.0, 4.0, 5.0])

    assert spread.median == 3.0
    assert spread.quartiles == (2.0, 4.0)
    assert spread.interval[0] < 3.0 < spread.interval[1]


def test_a_row_has_a_cell_for_every_title_and_names_the_machine():
    row = machine.markdown_row("a run", "python x.py", "1.0", "0.1")

    assert row.count("|") == len(machine.TITLES) + 1
    assert " cores, " in row


def test_cpu_time_is_that_of_all_ranks_and_wall_clock_that_of_the_slowest():
    pairs = [
        overhead.Pair(overhead.Clocks(1.0, 4.0), overhead.Clocks(2.0, 2.0)),
        overhead.Pair(overhead.Clocks(3.0, 5.0), overhead.Clocks(2.5, 1.0)),
    ]

    joined = overhead.over_ranks(pairs)

    assert joined == overhead.Pair(overhead.Clocks(4.0, 5.0), overhead.Clocks(4.5, 2.0))


def test_the_measured_run_is_a_valid_config(tmp_path):
    given = overhead.parse(["--vocabulary", "300", "--length", "8", "--student", "1x32"])

    overhead_case.write_case(tmp_path, given)

    config = load_config(tmp_path / "run.yaml")
    assert config.student.model.config["hidden_size"] == 32
    assert len((tmp_path / "tokenizer" / "vocab.txt").read_text().splitlines()) == 300


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_overhead_is_measured_and_printed(ranks):
    models = ["--teacher", "1x32", "--student", "1x32", "--vocabulary", "300"]
    sizes = ["--rows", "2", "--length", "8", "--pairs", "4", "--warm-up", "1", "--alone", "3"]
    program = [sys.executable, "benchmarks/overhead.py", "--ranks", str(ranks)]

    shown = subprocess.run(
        [*program, *models, *sizes], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, shown.stderr
    assert f"| step against a bare loop, {ranks} rank(s), 4 pairs" in shown.stdout
    assert "waiting for data: " in shown.stdout


@pytest.mark.parametrize("name", list(real_cases.CASES))
def test_a_real_run_is_a_valid_config_with_a_baseline(name, tmp_path):
    tree = {"output_dir": str(tmp_path / "run"), **real_cases.CASES[name].config(tmp_path)}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))

    config = load_config(path)

    assert config.baselines == ("alone",)


def test_a_real_run_without_its_data_says_so(monkeypatch, capsys, tmp_path):
    case = real_cases.Case("none", tmp_path / "absent", lambda _: None, lambda _: {})
    monkeypatch.setitem(real_runs.CASES, "sst2", case)

    code = real_runs.main(["sst2"])

    assert code == 1
    assert f"{tmp_path / 'absent'} does not exist" in capsys.readouterr().err


def test_every_seed_is_run_into_a_folder_of_its_own_and_summed_up(monkeypatch, capsys, tmp_path):
    calls = []

    def trained(config, output, *, ranks, overrides):
        calls.append((output.name, ranks, overrides))
        return report(distilled=0.6 + len(calls) / 100, alone=0.5)

    monkeypatch.setattr(quickstart_seeds, "trained", trained)
    monkeypatch.setattr(quickstart_seeds, "fetch_teacher", lambda: None)

    code = quickstart_seeds.main(["--seeds", "1,2", "--output", str(tmp_path), "seed=9"])

    assert code == 0
    assert calls == [
        ("quickstart-1", 2, ["seed=9", "seed=1"]),
        ("quickstart-2", 2, ["seed=9", "seed=2"]),
    ]
    shown = capsys.readouterr().out
    assert "distilled 0.615, alone 0.5, gain 0.115" in shown
    assert "8.0x" in shown
    assert "training 20 s" in shown


def test_maxidisc_tries_every_assistant_of_the_quickstarts_grid(tmp_path):
    overrides = [*quickstart_seeds.maxidisc(ROOT), f"output_dir={tmp_path}"]

    config = load_config(ROOT / quickstart_seeds.CONFIG, overrides)

    plain = load_config(ROOT / quickstart_seeds.CONFIG, [])
    assert (config.method.name, config.baselines) == ("maxidisc", ())
    assert config.method.sparsities == plain.method.sparsities
    assert config.method.target_sparsity == plain.method.target_sparsity
    assert config.teacher == plain.teacher


def test_minidisc_and_maxidisc_are_compared_seed_by_seed_without_teacher_and_baselines(
    monkeypatch, capsys, tmp_path
):
    folders = []

    def trained(config, output, *, ranks, overrides):
        folders.append(output.name)
        tries_all = "maxidisc" in output.name
        found = report(distilled=0.5 if tries_all else 0.6, alone=0.4)
        found["stages"].append({"name": "teacher-finetune", "seconds": 100.0})
        found["stages"].append({"name": "trial", "seconds": 36.0 if tries_all else 0.0})
        return found | ({"baselines": {}, "stages": found["stages"][2:]} if tries_all else {})

    monkeypatch.setattr(quickstart_seeds, "trained", trained)
    monkeypatch.setattr(quickstart_seeds, "fetch_teacher", lambda: None)

    code = quickstart_seeds.main(["--seeds", "1,2", "--output", str(tmp_path), "--maxidisc"])

    assert code == 0
    assert folders == [f"quickstart-{kind}{seed}" for seed in (1, 2) for kind in ("", "maxidisc-")]
    lines = capsys.readouterr().out.splitlines()
    heading = next(line for line in lines if "maxidisc s" in line)
    values = lines[lines.index(heading) + 1].split()
    assert values == ["1", "0.6", "0.5", "0.1", "12", "36", "0.3333"]


def test_a_stage_that_only_one_seed_needed_leaves_a_gap():
    longer = report(distilled=0.8, alone=0.7)
    longer["stages"].append({"name": "trial-2", "seconds": 5.0})

    lines = summary.table({1: report(distilled=0.6, alone=0.5), 2: longer}).splitlines()

    assert lines[0].split()[-2:] == ["trial-2", "s"]
    assert [line.split()[-1] for line in lines[1:]] == ["-", "5", "5", "0"]
    assert lines[3].split()[:3] == ["mean", "0.9", "0.7"]


def test_a_lower_perplexity_is_a_gain():
    better = report(distilled=5.0, alone=7.0, metric="perplexity")

    assert summary.gain(better) == 2.0


def test_pieces_are_read_with_the_usual_names_and_visible_spaces(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", MERGED)

    pieces = stories_tokenizer.read_pieces(path)

    assert [piece.text for piece in pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [piece.text for piece in pieces[259:]] == ["▁a", "b", "▁ab", "c", "bc", "a"]


def test_a_tokenizer_file_that_ends_early_is_refused(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", MERGED)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ValueError, match="ends in the middle of piece 264"):
        stories_tokenizer.read_pieces(path)


def test_of_two_merges_the_one_with_the_better_score_comes_first(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", ("bc", "ab", "▁", "a", "b", "c"))

    tokenizer = stories_tokenizer.stories_tokenizer(stories_tokenizer.read_pieces(path))

    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["<s>", "▁", "a", "bc"]


def test_an_unknown_character_is_its_bytes_and_comes_back(tmp_path):
    path = write_llama2c(tmp_path / "tok.bin", ("▁", "a"))
    tokenizer = stories_tokenizer.stories_tokenizer(stories_tokenizer.read_pieces(path))

    ids = tokenizer("a\né")["input_ids"]

    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁", "a", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\né"


def test_the_stories_model_knows_the_converted_tokenizer(shared_data, tmp_path):
    stories_tokenizer.write_tokenizer(shared_data / "weights/stories260K/tok512.bin", tmp_path)
    sample = shared_data / "lm/tinystories_sample/tinystories_1000.json"
    texts = json.loads(sample.read_text(encoding="utf-8"))[:100]

    loss = stories_tokenizer.nats_per_token(shared_data / "weights/stories260K/hf", tmp_path, texts)

    assert loss == pytest.approx(1.663, abs=0.005)
