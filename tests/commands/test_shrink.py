"""The config that `megakd shrink` writes: its content, what is missing, and who runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megakd import cli
from megakd.commands import shrink
from megakd.commands.shrink import FILE
from megakd.config.file import load_config

EXAMPLE = Path(__file__).resolve().parents[2] / "launch" / "examples" / "shrink.yaml"
FASTER = ("shrink", "model", "--data", "texts.csv", "--speedup", "8x")
WORDS = ("shrink", "org/Llama-1B", "--parameters", "0.6B", "--data", "text.txt")
SIZED = " ".join(WORDS)
LLAMA = Path("runs/Llama-1B-0.6B")
DECODER, NARROW = {"architectures": ["LlamaForCausalLM"]}, {"hidden_size": 576}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Folders of the runs that were started, in place of the runs; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    runs: list[Path] = []

    def run(config, command):
        del command
        assert (config.output_dir / FILE).exists()
        runs.append(config.output_dir)
        return 0

    monkeypatch.setattr(shrink, "train", run)
    return runs


def write_model(**keys: object) -> None:
    """Write the folder of a model, in the working folder."""
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(keys))


def test_the_file_is_written_and_then_run(started):
    cli.main([*WORDS, "--output_dir", "small"])
    assert started == [Path("small")]
    started.clear()

    assert cli.main([*WORDS, "train.learning_rate=3e-5", "train.max_steps=40"]) == 0

    config = load_config(LLAMA / FILE)
    command = "# Written by: megakd shrink org/Llama-1B --parameters 0.6B"
    assert (LLAMA / FILE).read_text().startswith(command)
    assert started == [LLAMA]
    assert config.output_dir == LLAMA
    assert config.teacher.model == "org/Llama-1B"
    assert config.student.model == "from_teacher"
    assert (config.task.type, config.task.dataset) == ("causal_lm", "text.txt")
    assert (config.method.name, config.method.parameters) == ("shrink", 600_000_000)
    assert (config.train.max_steps, config.train.learning_rate) == (40, 3e-5)


def test_the_example_has_the_settings_of_the_command(started):
    """Beside the on-policy finish, and what rows of 2048 tokens need."""
    cli.main([*WORDS])
    ours, example = load_config(LLAMA / FILE), load_config(EXAMPLE)

    assert replace(ours.method, parameters=400_000_000) == example.method
    train = {"gradient_checkpointing": True, "max_steps": example.train.max_steps}
    assert replace(ours.train, **train) == example.train
    assert (ours.eval, ours.student) == (example.eval, example.student)
    assert ours.task.max_eval_examples == example.task.max_eval_examples


@pytest.mark.parametrize(
    ("architecture", "finetune"),
    [("BertModel", {"learning_rate": 3e-4}), ("BertForSequenceClassification", None)],
)
def test_an_encoder_becomes_a_classifier_that_is_fine_tuned_if_it_is_none(
    started, architecture, finetune
):
    write_model(architectures=[architecture], hidden_size=384)

    cli.main([*FASTER])

    config = load_config(Path("runs/model-8x") / FILE)
    assert started == [Path("runs/model-8x")]
    assert (config.task.type, config.task.dataset) == ("classification", "texts.csv")
    assert (config.teacher.cache, config.student.dropout) == ("auto", 0.0)
    assert (config.method.speedup, config.train.learning_rate) == (8.0, 5e-4)
    cli.main([*FASTER, "objective=[{loss: soft_target_kl}, {loss: hidden_mse}]"])
    assert load_config(Path("runs/model-8x") / FILE).teacher.cache is None
    given = config.teacher.finetune
    assert given == finetune or given.learning_rate == finetune["learning_rate"]


def test_a_masked_language_model_is_neither_fine_tuned_nor_asked_once(started):
    write_model(architectures=["BertForMaskedLM"], hidden_size=384)

    assert cli.main([*FASTER, "task.type=mlm"]) == 0

    teacher = load_config(Path("runs/model-8x") / FILE).teacher
    assert (teacher.cache, teacher.finetune) == (None, None)


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        ({**DECODER, **NARROW}, 3e-4),
        ({**DECODER, "n_embd": 1152}, 1.5e-4),
        ({**DECODER, "hidden_size": "wide"}, 1e-4),
        # Without the name of a head the family tells a decoder.
        ({**NARROW, "model_type": "llama"}, 3e-4),
        ({**NARROW, "model_type": "qwen3_5", "architectures": ["Qwen3_5Model"]}, 3e-4),
        ({**NARROW, "model_type": "new"}, 3e-4),  # with the type of the task
        ({**NARROW, "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}, 3.333e-4),
        ({**NARROW, "model_type": "bert"}, 3.333e-4),
    ],
)
def test_a_wider_decoder_learns_with_a_lower_rate(started, keys, rate):
    write_model(**keys)
    words = ["task.type=causal_lm"] if keys.get("model_type") == "new" else []

    assert cli.main([*FASTER, *words]) == 0

    (folder,) = started
    assert load_config(folder / FILE).train.learning_rate == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("word", "epochs"), [("={}", 10), (".num_train_epochs=3", 3)])
def test_a_classifier_of_other_labels_is_fine_tuned_by_the_recipe(started, word, epochs):
    write_model(architectures=["BertForSequenceClassification"], hidden_size=384)

    assert cli.main([*FASTER, f"teacher.finetune{word}"]) == 0

    config = load_config(Path("runs/model-8x") / FILE)
    finetune = config.trainings["teacher.finetune"]
    assert (finetune.learning_rate, finetune.num_train_epochs) == (3e-4, epochs)


def test_a_finished_run_keeps_its_file_whose_comment_has_all_lines_of_the_command(started, capsys):
    cli.main([*WORDS, "objective=\n- loss: soft_target_kl"])
    file = LLAMA / FILE
    before = file.read_text()
    (file.parent / "report.json").write_text("{}")

    cli.main([*WORDS, "train.learning_rate=3e-5"])

    assert [term.loss for term in load_config(file).objective] == ["soft_target_kl"]
    assert file.read_text() == before
    words = [*WORDS, "--ranks", "2"]
    assert cli.main([*words, "objective=\n- loss: soft_target_kl"]) == 0
    assert cli.main(words) == 2
    assert "holds a finished run of other settings" in capsys.readouterr().err


def test_a_plan_and_a_config_are_printed_without_a_file(started, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(shrink, "print_plan", lambda config, _: planned.append(config.output_dir))

    assert cli.main([*FASTER, "--plan"]) == 0
    assert cli.main([*WORDS, "--print-config"]) == 0

    assert planned == [Path("runs/model-8x")]
    assert "parameters: 600000000" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert started == []


def test_the_size_may_be_an_override(started):
    assert cli.main(["shrink", "model", "--data", "text.txt", "method.flops=40%"]) == 0
    assert load_config(Path("runs/model-smaller") / FILE).method.flops == 0.4
    assert started


def test_several_ranks_are_started_by_the_launcher(started, capsys, monkeypatch):
    assert cli.main([*WORDS, "--ranks", "8"]) == 0

    assert capsys.readouterr().out.strip() == (
        "deepspeed --num_gpus 8 launch/train.py --config runs/Llama-1B-0.6B/shrink.yaml"
    )
    assert (LLAMA / FILE).exists()
    # A launcher is told to start the file.
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main([*WORDS]) == 2
    assert "write the config with --ranks 4" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shrink", "the model to shrink is missing"),
        ("shrink train.max_steps=3", "the model to shrink is missing"),
        ("shrink model --data f", "method: set exactly one of parameters (got None)"),
        ("shrink model --parameters 1B", "task.dataset: missing; set it, task.train_files"),
        (f"{SIZED} --speedup 8x", "not allowed with argument --parameters"),
        (f"{SIZED} --ranks 0", "--ranks must be at least 1"),
        (f"{SIZED} train.max_stepz=3", 'override "train.max_stepz=3"'),
        (f"{SIZED} --parameters much", "must be a number of weights such as 0.6B"),
        ("shrink model --data f --speedup fast", "must be a number such as 8x"),
        ("shrink model --data f --speedup 8x,2x", "must be a number such as 8x or 8"),
    ],
)
def test_bad_options_write_nothing_and_leave_the_file_of_the_last_command(
    started, capsys, words, message
):
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
    assert started == []
    cli.main([*WORDS])
    before = (LLAMA / FILE).read_text()
    assert cli.main(words.split()) == 2
    assert (LLAMA / FILE).read_text() == before
