"""The run config: what YAML means, what overrides do, and what each mistake is answered with."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import RUN, message_of

from megakd import cli
from megakd.config.file import dump_config, dump_yaml, load_config, parse_yaml
from megakd.config.messages import keys_at
from megakd.config.other_names import SYNONYMS
from megakd.config.sections import FinetuneOverrides, ScratchModel, TeacherConfig, TrainConfig
from megakd.config.terms import SoftTargetKl
from megakd.errors import ConfigError

OVERRIDES = (
    *("train.learning_rate=1", "train.learning_rate=3e-4"),
    *("objective.1.temperature=2", "objective[0].weight=0.25"),
    *("teacher=null", "teacher.model=other", "teacher.finetune.max_steps=10"),
    *("student.model={config: {model_type: bert}}", "student.model.config.hidden_size=64"),
    "task.tokenizer=a=b",
)


def test_defaults_fill_what_the_file_leaves_out(run_file):
    config = load_config(run_file)

    assert config.train == TrainConfig()
    assert config.output_dir == Path("runs/x")
    assert config.objective[1] == SoftTargetKl(loss="soft_target_kl", weight=0.5)


def test_one_column_needs_no_list(run_file):
    assert load_config(run_file, ["task.text_columns=utterance"]).task.text_columns == (
        "utterance",
    )


def test_overrides_win_over_the_file_and_later_ones_over_earlier(run_file):
    config = load_config(run_file, OVERRIDES)

    assert config.train.learning_rate == 3e-4
    assert [term.weight for term in config.objective] == [0.25, 0.5]
    assert config.objective[1].temperature == 2
    assert config.teacher == TeacherConfig(model="other", finetune=FinetuneOverrides(max_steps=10))
    assert config.student.model == ScratchModel(config={"model_type": "bert", "hidden_size": 64})
    assert config.task.tokenizer == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", 'train.lerning_rate = 1: unknown key; did you mean "learning_ra'),
        ("learning_rate=1", 'learning_rate = 1: unknown key; did you mean "train.learning_rate"?'),
        ("save.zzz=1", "save.zzz = 1: unknown key; known: save_steps, save_minutes"),
        ("objective.1.temprature=2", 'objective[1].temprature = 2: unknown key; did you mean "te'),
        ("objective.0.temperature=2", "objective[0].temperature = 2: unknown key; known: loss, we"),
        (
            "task.mixture={a: {wait: 1}}",
            'task.mixture.a.wait = 1: unknown key; did you mean "weigh',
        ),
        ("student.model={confg: {}}", 'student.model.confg = {}: unknown key; did you mean "conf'),
        ("objective.1.temperature=-1", "objective[1].temperature: must be greater than 0 (got -1)"),
        (
            "objective.1.loss=soft_target_kll",
            'objective[1].loss: unknown loss "soft_target_kll"; did you mean "soft_target_kl"? '
            "known: hard_cross_entropy, hard_mse, soft_target_kl,",
        ),
        ("objective.1.loss=kl_div", 'loss "kl_div"; did you mean "soft_target_kl"? known: hard_'),
        ("objective.1.loss=KL_div", 'loss "KL_div"; did you mean "soft_target_kl"? known: hard_'),
        ("objective.1.loss=KLDivLoss", 'did you mean "soft_target_kl"? known: hard_'),
        ("method.name=gkd", '"gkd"; did you mean "single" with a section rollout, as in launch/ex'),
        ("method.name=SFT", 'unknown method "SFT"; did you mean "finetune"? known: direct, '),
        ("student.deepspeed={fsdp: 1}", 'deepspeed: unknown key "fsdp"; megakd has no FSDP; stu'),
        ("student.deepspeed={tensor_parallel: {}}", 'parallel"; megakd has no tensor, pipeline'),
        ("objective.0.loss=kd", 'loss "kd"; did you mean "soft_target_kl"? known: hard_cross_ent'),
        ("objective.0.loss=ce", 'loss "ce"; did you mean "hard_cross_entropy"? known: hard_cross'),
        ("objective.0.loss=mse", 'did you mean "soft_target_mse" (logits) or "hidden_mse"? known:'),
        ("objective.0.loss=cosine", 'loss "cosine"; did you mean "hidden_cosine"? known: hard_'),
        ("objective.1.loss=3", "objective[1].loss: unknown loss 3; known: hard_cross_en"),
        ("objective.1={weight: 1}", "objective[1].loss: missing; known: hard_cross_entropy, "),
        ("objective=[3]", "objective[0]: must be a mapping (got 3)"),
        ("objective=[]", "objective: must have at least 1 item, not 0 (got [])"),
        ("objective=[hidden_mse]", 'must be a mapping (got "hidden_mse"); write {loss: hidden_'),
        ("method.name=singl", 'method.name: unknown method "singl"; did you mean "single"? known:'),
        ("method={}", "method.name: missing; known: direct, finetune"),
        ("method=single", 'method: must be a mapping (got "single"); write {name: single}'),
        ("student.model={}", "student.model.config: missing, and it has no default"),
        ("student=null", "student: must be a mapping (got null)"),
        ("student.model=3", "student.model: must be a valid string or a mapping (got 3)"),
        ("output_dir=2024", "output_dir: must be a valid string (got 2024)"),
        ("train.max_steps=true", "train.max_steps: must be a valid integer (got true)"),
        ("train.max_steps=1e3", "train.max_steps: must be a valid integer (got 1000.0)"),
        ("train.learning_rate=on", 'train.learning_rate: must be a valid number (got "on")'),
        ("train.learning_rate=.nan", 'train.learning_rate: must be a valid number (got ".nan")'),
        ("train.bf16=yes", 'train.bf16: must be true or false (got "yes")'),
        ("train.adam_beta2=1", "train.adam_beta2: must be less than 1 (got 1)"),
        ("train.warmup_ratio=2", "train.warmup_ratio: must be less than or equal to 1 (got 2)"),
        ("train.max_steps=0", "train.max_steps: must be greater than or equal to 1 (got 0)"),
        # Numbers beyond all measure.
        ("seed=1180591620717411303424", "seed: must be less than 4294967296"),
        ("train.max_steps=1000000000000000000000", "train.max_steps: must be less than or equal t"),
        ("train.num_train_epochs=1e300", "train.num_train_epochs: must be less than or equal to"),
        ("task.max_length=1000000000000", "task.max_length: must be less than or equal to"),
        ("train.lr_scheduler_type=cosin", "'cosine_with_min_lr' or 'warmup_stable_decay' (got"),
        ("task.type=clasification", '(got "clasification"); did you mean "classification"?'),
        ("task.labels=a", 'task.labels: must be a list (got "a"); write [a]'),
        ("task.text_columns=[a, b, c]", "task.text_columns: must have at most 2 items, not 3"),
        ("task.tokenizer={type: wordpice}", "task.tokenizer.type: must be 'wordpiece' or 'bpe'"),
        ("task={type: classification}", "task.dataset: missing; set it, task.train_files or"),
        ('task.dataset="\\ud800"', "the config: Invalid JSON"),
        *(
            (f"objective.1={{loss: {term}}}", text)
            for term, text in {
                "hidden_mse, layer_mapping: unform": 'list (got "unform"); did you mean "uniform"?',
                "hidden_mse, layer_mapping: ['7:1', 7-2]": "layer_mapping[1]: must be a layer pair",
                "hidden_mse, layer_mapping: []": "layer_mapping: must have at least 1 item, not 0 ",
                "relation_fsp, layer_mapping: last": "layer_mapping: must be 'uniform' or a list (",
                "relation_fsp, layer_mapping: ['1:2']": "layer_mapping: must have at least 2 items",
                "relation_kl, relations: [query, keys]": "'value' or 'query_key' (got",
                "relation_kl, relations: [value, value]": "relations: value is listed twice",
                "relation_kl, relation_heads: 0": "relation_heads: must be greater than or equal t",
                "attention_mse, fit: score": '(got "score"); did you mean "scores"',
                "soft_target_skew_kl, skew: 1": "objective[1].skew: must be less than 1 (got 1)",
            }.items()
        ),
        ("train.kernels=cuda", "train.kernels: must be 'auto', 'triton', 'chunked' or 'reference'"),
        # A form that the key does not have.
        (
            "teacher.model=https://huggingface.co/google-bert/bert-base-uncased",
            "teacher.model: must be a local folder or file, or an id on the Hugging Face Hub "
            '(got the URL "https://huggingface.co/google-bert/bert-base-uncased"); '
            'write "google-bert/bert-base-uncased"',
        ),
        ("student.model=http://x.org/model", 'on the Hugging Face Hub (got the URL "http://x.org/'),
        ("task.dataset=s3://bucket/rows.csv", '(got the URL "s3://bucket/rows.csv")'),
        ("output_dir=gs://bucket/runs", "output_dir: must be a local folder (got the URL"),
        ("output_dir=[a]", 'must be a valid string (got ["a"])'),
        ("student.model=[a]", 'must be a valid string or a mapping (got ["a"])'),
        ("method.name=[single]", 'method.name: unknown method ["single"]; did you mean "single"?'),
        *(
            (f'{key}=""', 'names nothing (got ""); give a name, or remove the key')
            for key in ("task.dataset", "teacher.model")
        ),
        ("output_dir=''", 'output_dir: must name a folder (got "")'),
        # Overrides that cannot be applied.
        ("train.max_steps", 'override "train.max_steps" is not of the form key=value'),
        ("=3", 'override "=3" is not of the form key=value'),
        ("a..b=3", 'override "a..b=3" is not of the form key=value'),
        ("objective.2.weight=1", "objective is a list of 2 items, numbered from 0, without an ite"),
        ("objective.x=1", 'objective is a list of 2 items, numbered from 0, without an item "x"'),
        ("student.model.config=1", 'student.model is "student" and has no keys'),
        ("output_dir.a.b=1", 'output_dir is "runs/x" and has no keys'),
        ("train.max_steps=[1", 'override "train.max_steps=[1": line 1: while parsing a flow seq'),
    ],
)
def test_a_value_that_does_not_fit_gets_one_line(run_file, override, message):
    text = message_of(run_file, override)

    assert message in text
    assert "\n" not in text
    assert text.startswith(f'override "{override[:50]}')
    assert "Value error" not in text


def test_several_problems_are_listed_one_per_line_and_a_long_value_is_cut(run_file):
    text = message_of(run_file, "objective.1.temperature=-1", "train.lr=1", "task.max_length=1")

    first, *lines = text.split("\n")
    assert first == "3 problems"
    keys = [line.split('": ')[1].split()[0].rstrip(":") for line in lines]
    assert keys == ["task.max_length", "objective[1].temperature", "train.lr"]
    assert len(message_of(run_file, f"train.max_steps={'x' * 500}")) < len(str(run_file)) + 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.yaml cannot be read (No such file or directory); give a YAML file"),
        (b"output_dir: x\ntask: \xff", "position 20: invalid start byte); give a YAML file in UTF"),
        (b"a: [", "run.yaml: line 1: while parsing"),
        (b"", "run.yaml: is empty; a run config is a mapping"),
        (b"[1, 2]", "run.yaml: holds [1, 2]; a run config is a mapping"),
        (b"task: " + b"{a: " * 3000 + b"}" * 3000, "cannot be read: maximum recursion depth"),
        ("folder", "run.yaml cannot be read (Is a directory); give a YAML file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    assert message in message_of(path)


@pytest.mark.parametrize(
    "overrides",
    [
        OVERRIDES,
        (
            'output_dir="of~x: #1"',
            "task={type: classification, dataset: 1e-4é\u2028, text_columns: ['on', 'null']}",
            "task.tokenizer={type: bpe}",
            "teacher={model: '0x1F', dtype: bf16, deepspeed: {zero_optimization: {stage: 3}}}",
            "student.model={config: {'7:1': null, '': 010, a: '010'}}",
            "objective=[{loss: hidden_mse, layer_mapping: ['1:6', '2:12']}]",
            "train={learning_rate: 0, weight_decay: 3}",
        ),
        ("objective=null", "method.teacher=teacher", "train.learning_rate=1e300"),
    ],
    ids=["merged", "words that YAML could read otherwise", "nothing"],
)
def test_a_written_config_is_read_back_equal(run_file, overrides):
    config = load_config(run_file, overrides)
    run_file.write_text(dump_config(config), encoding="utf-8")

    assert load_config(run_file) == config


def test_the_config_and_the_options_of_all_methods_are_printed_without_a_heavy_library(run_file):
    heavy = "{'torch', 'deepspeed', 'transformers', 'datasets'}"
    code = "import sys, megakd.cli as c; c.train_main(); "
    code += "print(*(name for name in sys.modules if name.startswith('megakd.methods.'))); "
    code += f"c.main(['methods']); print({heavy} & {{*sys.modules}})"
    command = [sys.executable, "-c", code, "--print-config", "--config", str(run_file)]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "output_dir:" in done.stdout
    assert "megakd.methods.single" in done.stdout.splitlines()  # of the named method alone
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("010", 10),
        ("0x1F", "0x1F"),
        ("true", True),
        ("", None),
        ("on", "on"),
        ("7:1", "7:1"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{1: a, on: b}", {"1": "a", "on": "b"}),
    ],
    ids=repr,
)
def test_scalars_mean_what_yaml_1_2_says(text, value):
    parsed = parse_yaml(text, source="test")

    assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'line 3: the key "a" is given twice'),
        ("a:\n  b: 1\n  b: 1", 'line 3: the key "b" is given twice'),
        ("a: [1, 2", "line 1: while parsing a flow sequence expected ',' or ']'"),
        ("a:\n\t- 1", "line 2: while scanning for the next token found character '\\t'"),
        ("? [a]\n: 1", "line 1: expected a scalar node, but found sequence"),
        ("a: !!int x", "cannot be read: invalid literal for int() with base 10: 'x'"),
        ("a: !!python/name:os.system x", "line 1: could not determine a constructor for the tag"),
        ("a: b\nc: \x07", "cannot be read: unacceptable character #x0007: special char"),
        ("a: 1\n---\nb: 1", "line 2: expected a single document"),
        ("a: *b", "line 1: found undefined alias 'b'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_broken_yaml_is_refused_naming_the_line(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, source="run.yaml")


NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
WORDS = ["on", "1e-4", "7:1", "null", "0x1F", "<<", ".inf", "2024-01-01", "\x85", "a\u2028b", "\r"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.none() | NUMBERS | TEXTS | st.sampled_from(WORDS)
KEYS = st.text("ab<=1~", max_size=3)


@settings(max_examples=50)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)))
def test_what_is_written_is_read_back(tree):
    assert parse_yaml(dump_yaml(tree), source="test") == tree
    # Words are quoted where older YAML reads them otherwise.
    assert dump_yaml({"a": "on", "b": "7:1"}) == "a: 'on'\nb: '7:1'\n"


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        ("train.max_steps=3; student.lora.r=4; student.layers=1", '"student.lora.r=4": student.lo'),
        ("seed=1; task.evaluation_sets.2024=[]", '"task.evaluation_sets.2024=[]": '),
        ("train.bf16=true; train.fp16=true", '"train.bf16=true train.fp16=true": train: bf16 and'),
    ],
)
def test_the_overrides_of_a_mistake_alone_are_blamed(run_file, overrides, blamed):
    text = message_of(run_file, *overrides.split("; "))

    assert text.startswith(f"override {blamed}")
    assert str(run_file) not in text
    assert "max_steps" not in text


def test_mistakes_of_both_are_told_apart(run_file):
    run_file.write_text(RUN + "train: {max_steps: -1}\n", encoding="utf-8")

    first, *lines = message_of(run_file, "objective=[{loss: soft_target_k}]").split("\n")

    assert first == "2 problems"
    of_file = f"{run_file}: train.max_steps: must be greater than or equal to 1 (got -1)"
    assert f"  {of_file}" in lines
    override = '  override "objective=[{loss: soft_target_k}]": '
    assert any(line.startswith(override) for line in lines)
    assert message_of(run_file, "seed=7") == of_file  # whatever is overridden


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1", '"train.learning_rate"'),
        ("train.lr=1", '"learning_rate"'),
        ("model_name_or_path=x", '"student.model" or "teacher.model"'),
        ("teacher.model_name_or_path=x", '"model"'),
        ("train.per_device_eval_batch_size=1", '"eval.per_device_eval_batch_size"'),
        ("teacher.finetune={epochs: 1}", '"num_train_epochs"'),
        ("lora_alpha=8", '"student.lora.alpha"'),
        ("student.lora.lora_r=8", '"r"'),
        ("rollout.lmbda=0.5", '"mix"'),
        ("train.eval_strategy=steps", '"eval.eval_steps"'),
        ("student.bf16=true", '"train.bf16"'),
        ("task_type=ner", '"task.type"'),
    ],
)
def test_names_of_other_libraries_are_known_wherever_they_stand(run_file, override, meant):
    assert f"unknown key; did you mean {meant}?" in message_of(run_file, override)


TASKS = "distil the encoder with task.type: mlm, and train final/ in "


@pytest.mark.parametrize(
    ("names", "use"),
    [
        (
            "sequence_parallel_size context_parallel_size cp_size ulysses_sequence_parallel_size",
            "megakd has no parallelism within a text; lower task.max_length, or set train.gradi",
        ),
        (
            "tensor_parallel_size tensor_model_parallel_size tp_size autotp_size pp "
            "pipeline-parallel-size expert_model_parallel_size",
            "megakd has no tensor, pipeline or expert parallelism; student.deepspeed: zero3 and",
        ),
        (
            "fsdp fsdp_config FSDP fsdp_transformer_layer_cls_to_wrap",
            "megakd has no FSDP; student.deepspeed: zero3 shards weights in the same way",
        ),
        (
            "resume_from_checkpoint resume",
            "megakd has no key to go on, a run does so by itself; to begin anew, set another outp",
        ),
        ("token_classification ner", f"megakd has no task with labels of words; {TASKS}transfo"),
        ("embedding sentence_similarity", f"megakd has no task of embeddings; {TASKS}sentence-"),
    ],
)
def test_what_megakd_lacks_is_said_with_what_to_use_wherever_it_is_asked_for(
    run_file, names, use, capsys
):
    for name in names.split():
        for override in (f"{name}=2", f"train.{name}=2", f"teacher.{name}={{a: 1}}"):
            assert f": unknown key; {use}" in message_of(run_file, override)
        assert cli.main(["train", "--config", str(run_file), f"--{name}", "2"]) == 2
        assert f"unknown option --{name}; {use}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kinds", "use"),
    [
        (
            "ner NER token-classification TokenClassification AutoModelForTokenClassification "
            "pos-tagging sequence_labeling",
            f"megakd has no task with labels of words; {TASKS}transformers for them",
        ),
        (
            "embedding embeddings sentence-similarity SentenceTransformer feature-extraction "
            "retrieval reranking sts contrastive",
            f"megakd has no task of embeddings; {TASKS}sentence-transformers, or learn scores of",
        ),
        (
            "seq2seq summarization translation question-answering text2text-generation QA",
            "megakd has no such task; a decoder learns it with task.type: causal_lm from rows wi",
        ),
        ("text-classification sequence_classification", 'did you mean "classification"?'),
        (
            "CAUSAL_LM text-generation sft instruction AutoModelForCausalLM language-modeling",
            'did you mean "causal_lm"?',
        ),
        ("fill-mask MaskedLM masked_language_modeling", 'did you mean "mlm"?'),
        ("multi-label SEQ_CLS", 'did you mean "classification"?'),
        ("TOKEN_CLS", f"megakd has no task with labels of words; {TASKS}transfo"),
    ],
)
def test_a_task_that_megakd_lacks_is_answered_with_what_to_use(run_file, kinds, use):
    for kind in kinds.split():
        assert f'(got "{kind}"); {use}' in message_of(run_file, f"task.type={kind}")


def test_an_option_named_as_hugging_face_names_it_is_told_as_a_setting(run_file, capsys):
    cli.main(["train", "--config", str(run_file), "--lr", "1e-4"])

    assert "settings are written train.learning_rate=value" in capsys.readouterr().err


def test_every_synonym_stands_for_keys_that_exist_and_is_none_itself():
    tree = {"task": {}, "teacher": {}, "student": {}, "train": {}}
    for word, keys in SYNONYMS.items():
        for key in keys:
            *section, name = key.split(".")
            assert name in keys_at(tuple(section), tree), key
            assert word not in keys_at(tuple(section), tree), word


@pytest.mark.parametrize("begun", [True, False])
def test_the_folder_of_a_run_stands_for_its_config_also_at_a_new_place(run_file, tmp_path, begun):
    moved = tmp_path / "moved"
    moved.mkdir()
    run_file.rename(moved / "config.yaml")
    if begun:
        (moved / "metrics.jsonl").touch()

    here, written = load_config(moved), load_config(moved / "config.yaml")

    assert here == (replace(written, output_dir=moved) if begun else written)
    assert load_config(moved, ["output_dir=elsewhere"]).output_dir == Path("elsewhere")
