"""HomoDistil's benchmark: valid and alike runs, the numbers of its reports, and its tokenizer."""

from __future__ import annotations

import json
import struct

import pytest
import reports
import yaml

from lib import launching, stories
from methods import homodistil


@pytest.fixture
def given(tmp_path):
    out = str(tmp_path / "out")
    words = ["--data", str(tmp_path), "--out", out, "--seeds", "1", "--steps", "1000"]
    given = homodistil.parse(words)
    launching.write_leg_configs(given.out, {"prune": homodistil.config(given)})
    return given


def test_the_variants_differ_in_the_method_alone(given, load):
    result = load(homodistil.legs(given))

    assert len({(config.train, config.task.dataset) for config in result.values()}) == 1
    methods = {name: config.method for name, config in result.items()}
    assert [(m.every, m.pruning_end) for m in methods.values()] == [
        (1, None),
        (1, 700),
        *[(20, 20)] * 2,
    ]
    assert result["homodistil-1"].baselines == ("random", "alone")
    assert [name for name, c in result.items() if c.objective] == ["one_shot_alone-1"]
    assert all(config.eval.keep_best is False for config in result.values())


def test_a_pruned_student_and_a_baseline_of_its_run_have_their_loss_jump_and_seconds():
    seconds = {"pruning-1": 3.0, "student": 4.0, "random": 6.0, "alone": 5.0}
    losses = {"student__loss": 4.5, "teacher__loss": 3.0, "alone__loss": 6.0}
    report = reports.report_of(
        student__parameters=100,
        stages=[{"name": name, "seconds": value} for name, value in seconds.items()],
        pruning=[{"step": n, "teacher_kl": kl} for n, kl in enumerate((0.1, 0.3, 0.2))],
        **losses,
    )

    def of(name: str) -> dict:
        return homodistil.numbers({"homodistil-1": report, "late-1": None}, name, 1)

    numbers = {"loss": 4.5, "seconds": 7.0, "parameters": 100}
    assert of("homodistil") == {**numbers, "largest jump": pytest.approx(0.2)}
    assert of("alone") == {"loss": 6.0, "seconds": 5.0}
    assert (of("teacher"), of("late")) == ({"loss": 3.0, "seconds": None}, {})


def test_a_finished_leg_is_not_started_again_and_one_of_other_settings_is_refused(given):
    leg = homodistil.legs(given)[1]
    leg.output.mkdir(parents=True)
    config = yaml.safe_load(leg.config.read_text())
    config["method"] |= {"pruning_end": 700}
    text = yaml.safe_dump(config | {"seed": 1, "output_dir": str(leg.output)})
    (leg.output / "config.yaml").write_text(text)

    assert launching.finished(leg) is None
    report = reports.report_of(environment__ranks=1)
    (leg.output / "report.json").write_text(json.dumps(report))
    assert launching.report_of(leg, ranks=1) == json.loads(json.dumps(report))
    with pytest.raises(launching.UnusableError, match="holds a run of another config"):
        launching.finished(leg._replace(overrides=(*leg.overrides, "train.max_steps=777")))


def test_a_tokenizer_of_llama2c_has_its_pieces_best_merge_first_and_unknown_characters_as_bytes(
    tmp_path,
):
    # Begins as every such file does; of the pieces the first has the best score.
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *bytes_, "bc", "ab", " ", "a", "b", "c"]
    content = struct.pack("<i", 7)
    for index, text in enumerate(texts):
        content += struct.pack("<fi", -float(max(0, index - 259)), len(text)) + text.encode()
    path = tmp_path / "tok.bin"
    path.write_bytes(content)
    pieces = stories.read_pieces(path)
    tokenizer = stories.stories_tokenizer(pieces)

    ids = tokenizer("a\né")["input_ids"]

    assert [piece.text for piece in pieces[259:]] == ["bc", "ab", "▁", "a", "b", "c"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["<s>", "▁", "a", "bc"]
    assert tokenizer.convert_ids_to_tokens(ids)[3:] == ["<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\né"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends in the middle of piece 264"):
        stories.read_pieces(path)
