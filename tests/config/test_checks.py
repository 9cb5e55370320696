"""Settings that contradict each other, found before any data or model is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config
from megakd.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alone={max_steps: 3}"], "alone: baselines does not list alone; add baselines: [alone]"),
        (["teacher=null"], 'teacher: missing, and method "single" needs a teacher; set'),
        (
            ["method.name=finetune", "objective=null"],
            'teacher: method "finetune" learns only from the labels and does not use a teacher',
        ),
        (
            ["method.name=finetune", "teacher=null", "objective=[{loss: soft_target_kl}]"],
            'objective[0].loss: soft_target_kl compares with a teacher, and method "finetune"',
        ),
        (
            ["method.name=finetune", "teacher=null", "objective=[{loss: hidden_cosine}]"],
            'objective[0].loss: hidden_cosine compares with a teacher, and method "finetune"',
        ),
        *(
            (
                ["method.name=finetune", "teacher=null", f"objective=[{{loss: {name}}}]"],
                f'objective[0].loss: {name} compares with a teacher, and method "finetune"',
            )
            for name in ("soft_target_tvd", "embedding_mse", "relation_fsp", "attention_mse")
        ),
        (
            ["train.bf16=true", "train.fp16=true"],
            "train: bf16 and fp16 are both true; set one of them",
        ),
        (
            ["train.bf16=true", "teacher.finetune.fp16=true"],
            "teacher.finetune: bf16 and fp16 are both true (a key that is not set here is",
        ),
        (
            ["train.bf16=true", "baselines=[alone]", "alone={fp16: true}"],
            "alone: bf16 and fp16 are both true (a key that is not set here is inherited from",
        ),
        (
            ["baselines=[alone]", "alone={bf16: true, fp16: true}"],
            "alone: bf16 and fp16 are both true (a key that is not set here is inherited from",
        ),
        (
            ["objective.1={loss: hard_mse}"],
            "objective[1].loss: hard_mse supports only task.type regression, and task.type is cl",
        ),
        (
            ["objective.1={loss: soft_target_mse}", "task.type=causal_lm"],
            "objective[1].loss: soft_target_mse supports only task.type regression, and task.type",
        ),
        (
            [
                "task.type=regression",
                "task.dataset=glue/stsb",
                "objective=[{loss: soft_target_kl}]",
            ],
            "objective[0].loss: soft_target_kl supports only task.type classification, mlm, "
            "causal_lm, and task.type is regression",
        ),
        (
            ["objective.1={loss: hard_cross_entropy}"],
            'objective: "hard_cross_entropy" is listed 2 times; keep one',
        ),
        (["objective.0.weight=0", "objective.1.weight=0"], "objective: every weight is 0"),
        (["eval.keep_best=true"], "eval.keep_best: true needs evaluations during training"),
        (
            ["eval.latency.tokens=512", "task.max_length=64"],
            "eval.latency.tokens: 512 is longer than the texts of the run (task.max_length 64)",
        ),
        (["task.text_columns=[a]"], "task.text_columns: not supported with task.dataset pydocs"),
        (["task.label_column=a"], "task.label_column: not supported with task.dataset pydocs"),
        (
            ["task.type=causal_lm", "task.labelled_examples=5"],
            "task.labelled_examples: supported only for classification and regression",
        ),
        (
            ["task.type=mlm", "task.labelled_examples=5"],
            "classification and regression, and task.type is mlm; remove the key",
        ),
        (
            ["task.type=causal_lm", "task.mlm_probability=0.2"],
            "task.mlm_probability: supported only for mlm, and task.type is causal_lm; remove",
        ),
        (
            ["task.type=causal_lm", "task.whole_word_masking=true"],
            "task.whole_word_masking: supported only for mlm, and task.type is causal_lm; remove",
        ),
        (
            ["task.streaming=true"],
            "task.streaming: supported only for mlm and causal_lm, and task.type is classification",
        ),
        (["task.type=mlm", "task.mlm_probability=0"], "task.mlm_probability: must be above 0"),
        (["task.type=mlm", "task.mlm_probability=1.5"], "task.mlm_probability: must be at most 1"),
        (
            ["task.type=masked_lm"],
            'task.type: must be "classification", "regression", "mlm" or "causal_lm" '
            '(got "masked_lm")',
        ),
        (
            ["task.type=mlm", "objective.1={loss: hard_mse}"],
            "objective[1].loss: hard_mse supports only task.type regression, and task.type is mlm",
        ),
        (["baselines=[alone, alone]"], 'baselines: "alone" is listed 2 times'),
        (["baselines=[allone]"], 'has no baseline "allone"; did you mean "alone"? (known: alone)'),
        (["baselines=[direct]"], 'has no baseline "direct" (known: alone)'),
        (["student.deepspeed=zero22"], 'student.deepspeed: unknown preset "zero22"; did you mean'),
        (["teacher.deepspeed=zero2"], "teacher.deepspeed: ZeRO stage 2 shards gradients and opti"),
        (
            ["teacher.finetune.deepspeed={gradient_clipping: 1}"],
            'teacher.finetune.deepspeed sets "gradient_clipping", which megakd takes from '
            "teacher.finetune.max_grad_norm",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    run_file: Path, overrides: list[str], message: str
) -> None:
    text = message_of(run_file, *overrides)

    assert message in text
    assert "\n" not in text


STREAM = (
    *("task.type=mlm", "task.streaming=true", "train.max_steps=9", "task.dataset=null"),
    *("task.train_files=a.jsonl", "task.validation_files=b.jsonl", "task.tokenizer=t"),
    "objective=[{loss: soft_target_kl}]",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.max_steps=null"],
            "train.max_steps: missing, and task.streaming is true: a stream has no end, so "
            "num_train_epochs says nothing about its length; set train.max_steps, or remove task.s",
        ),
        (
            ["teacher.finetune.num_train_epochs=2"],
            "teacher.finetune.max_steps: missing, and task.streaming is true",
        ),
        (
            ["baselines=[alone]", "alone={num_train_epochs: 2}"],
            "alone.max_steps: missing, and task.streaming is true",
        ),
        (
            ["task.validation_files=null"],
            "task.streaming: a stream has no end, so no share of it can be held out; set "
            "task.validation_files, or set task.max_eval_examples",
        ),
        (
            ["task.train_files=null", "task.validation_files=null", "task.dataset=pydocs"],
            "task.streaming: task.dataset pydocs is small and is always read before training",
        ),
        (
            ["task.train_files=null", "task.validation_files=null", "task.dataset=glue/sst2"],
            "task.streaming: task.dataset glue/sst2 is small",
        ),
        (
            ["task.tokenizer={type: bpe}"],
            "task.tokenizer: a bpe cannot be trained on a stream (task.streaming is true); set a",
        ),
        (
            ["task.type=causal_lm", "teacher.finetune=null", "teacher.cache=answers"],
            "teacher.cache: cannot be combined with task.streaming, whose rows have no numbers",
        ),
    ],
)
def test_a_stream_needs_a_number_of_steps_and_no_numbers_of_rows(
    run_file: Path, overrides: list[str], message: str
) -> None:
    text = message_of(run_file, *STREAM, *overrides)

    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.keep_best=true", "eval.eval_steps=5"],
        ["task.type=mlm", "task.whole_word_masking=true", "objective=[{loss: soft_target_kl}]"],
        [*STREAM],
        [*STREAM, "task.type=causal_lm"],
        [*STREAM, "task.validation_files=null", "task.max_eval_examples=5"],
        ["train.bf16=true", "teacher.finetune={bf16: false, fp16: true}"],
        ["task.type=causal_lm", "objective=[{loss: soft_target_jsd}, {loss: hidden_mse}]"],
        ["task.type=mlm", "task.mlm_probability=0.3", "objective=[{loss: soft_target_kl}]"],
        ["task={type: regression, dataset: x.csv}", "objective=[{loss: soft_target_mse}]"],
        ["task.labelled_examples=5", "objective.0.weight=0"],
        ["teacher.deepspeed=zero3", "student.deepspeed=teacher_zero0"],
    ],
)
def test_settings_near_those_refusals_are_accepted(run_file: Path, overrides: list[str]) -> None:
    assert load_config(run_file, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.early_stopping_patience=2"],
            "train.early_stopping_patience: 2 counts evaluations, and eval.eval_steps is not set; "
            "set "
            "eval.eval_steps",
        ),
        (
            ["teacher.finetune={early_stopping_patience: 2}"],
            "teacher.finetune.early_stopping_patience: 2 counts evaluations",
        ),
        (
            ["train.lr_scheduler_type=constant", "train.warmup_steps=3"],
            "train.lr_scheduler_type: constant: this schedule has no warm-up; use constant_with_",
        ),
        (
            ["train.lr_scheduler_type=constant", "teacher.finetune={warmup_ratio: 0.1}"],
            "teacher.finetune.lr_scheduler_type: constant: this schedule has no warm-up",
        ),
        (
            ["train.lr_scheduler_kwargs={num_cycles: 2}"],
            "train.lr_scheduler_kwargs.num_cycles = 2: unknown key; known: none (of linear)",
        ),
        (
            ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={powr: 2}"],
            'train.lr_scheduler_kwargs.powr = 2: unknown key; did you mean "power"? (of poly',
        ),
        (
            ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={power: yes}"],
            'train.lr_scheduler_kwargs.power: must be a number (got "yes") (of polynomial)',
        ),
        (
            ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={lr_end: 1}"],
            "train.lr_scheduler_type: polynomial: lr_end 1 must be below learning_rate 5e-05",
        ),
        (
            ["train.lr_scheduler_type=cosine_with_min_lr"],
            "train.lr_scheduler_type: cosine_with_min_lr: set exactly one of min_lr and "
            "min_lr_rate",
        ),
        (
            ["train.lr_scheduler_type=warmup_stable_decay"],
            "train.lr_scheduler_kwargs.num_decay_steps: missing, and it has no default (of warm",
        ),
        (
            [
                "train.max_steps=10",
                "train.lr_scheduler_type=warmup_stable_decay",
                "train.lr_scheduler_kwargs={num_decay_steps: 20}",
            ],
            "warmup_stable_decay: warm-up 0, stable 0 and decay 20 take 20 steps, and the stage",
        ),
        (
            ["log.tensorboard=true"],
            'log.tensorboard = true: unknown key; did you mean "report_to"?',
        ),
        (
            ["eval.metric=f1_makro"],
            'eval.metric: task.type classification has no metric "f1_makro"; did you mean "f1_',
        ),
        (
            ["eval.metrics=[accuracy, pearson]"],
            'eval.metrics[1]: task.type classification has no metric "pearson"; did you',
        ),
        (
            ["task.type=causal_lm", "eval.positive_label=x"],
            "eval.positive_label: supported only for classification, whose labels have names, and",
        ),
        (
            ["save.push_to_hub=me"],
            "save.push_to_hub: must be a Hub repository of the form user/name (got",
        ),
    ],
)
def test_how_a_stage_is_trained_and_logged_is_checked_with_the_config(run_file, overrides, message):
    assert message in message_of(run_file, *overrides)


def test_a_teacher_with_another_schedule_does_not_inherit_its_options(run_file):
    load_config(
        run_file,
        [
            "train.lr_scheduler_type=polynomial",
            "train.lr_scheduler_kwargs={power: 2}",
            "teacher.finetune={lr_scheduler_type: cosine}",
        ],
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"train_files": "a", "dataset": "b"},
            "task.train_files: cannot be combined with task.dataset",
        ),
        (
            {"dataset": "b", "test_files": ["a"]},
            "task.test_files: cannot be combined with task.dataset",
        ),
        (
            {"test_files": "a"},
            "task.dataset: missing, and it has no default; set task.dataset or task",
        ),
        ({"train_files": "a", "data_dir": "b"}, "task.data_dir: supported only with task.dataset"),
        ({"train_files": []}, "task.train_files"),
        (
            {"dataset": "b", "evaluation_sets": {"test": "a"}},
            "and not be train, validation or test",
        ),
        (
            {"dataset": "b", "evaluation_sets": {"a b": "a"}},
            "the name of an evaluation set must consist of letters",
        ),
    ],
)
def test_data_is_named_in_one_way(tmp_path, task, message):
    tree = {
        "output_dir": "out",
        "task": {"type": "classification", **task},
        "student": {"model": "m"},
        "method": {"name": "finetune"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert message in str(caught.value)
