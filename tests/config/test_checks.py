"""Settings that cannot be or contradict each other, found before data or models are touched."""

from __future__ import annotations

import pytest
from run_files import message_of

from megakd.config.file import load_config

KL_ON = "{loss: soft_target_kl, on: data}"
KL = "objective=[{loss: soft_target_kl}]"
TEXT = f"task={{type: causal_lm, dataset: rows.jsonl}}; {KL}"
STREAM = (
    "task={type: mlm, streaming: true, train_files: a.jsonl, validation_files: b.jsonl, "
    f"tokenizer: t}}; train.max_steps=9; {KL}"
)
LONE = "method.name=finetune; teacher=null"
PACKED = f"{TEXT}; task.max_length=64; train.tokens_per_rank=256"
SERVED = "teacher={model: big, server: {url: ['http://a:1']}}"
POOL = "teacher=null; teachers=[{name: a, model: m}, {name: b, model: n}]"
NO_SET = f"{TEXT}; task.dataset=null"
ROUTED = f"{TEXT}; {POOL}; method={{name: routed}}"
CUT = "method={name: minidisc, target_sparsity: 0.6}"
URL = "url: ['http://a:1']"
PUSH = "push: full, folder: w"
NO_PUSH = "push: none"
HARD = f"{KL[:-1]}, {{loss: hard_cross_entropy}}]"
HARD_ON_DATA = f"{HARD[:-2]}, on: data}}]"
MIXTURE = "task.mixture={a: {files: a.jsonl, weight: 1}}"
A = "task.mixture={a: {files: a.jsonl, weight: 1, teacher: a}"

# Overrides, separated by semicolons, and a part of the message.
TASK = [
    ("task.train_files=a", "task.train_files: cannot be combined with task.dataset, which has s"),
    ("task.test_files=[a]", "task.test_files: cannot be combined with task.dataset"),
    (f"{TEXT}; task.mixture={{a: {{files: a, weight: 1}}}}", "task.mixture: cannot be combined wi"),
    ("task.dataset=null", "task.dataset: missing; set it, task.train_files or task.mixture"),
    ("task.dataset=null; task.train_files=a; task.dataset_config=b", "no effect without task.data"),
    ("task.dataset=glue/sst2; task.text_columns=[a]", "task.text_columns: not supported with task"),
    ("task.dataset=glue/sst2; task.label_column=a", "task.label_column: not supported with task.d"),
    (f"{TEXT}; task.labelled_examples=5", "task.labelled_examples: supported only for classificat"),
    (f"task.type=mlm; {KL}; task.labelled_examples=5", "and task.type is mlm; remove the key"),
    (f"{TEXT}; task.mlm_probability=0.2", "task.mlm_probability: supported only for mlm, and task"),
    ("task.streaming=true", "task.streaming: supported only for mlm and causal_lm, and task.type"),
    ("task.train_on=last", "task.train_on: supported only for causal_lm, and task.type is classif"),
    (f"{TEXT}; task.text_columns=[a]; task.messages_column=b", "with task.text_columns, which nam"),
    (f"{TEXT}; task.messages_column=a; task.prompt_column=b", "with task.messages_column, which h"),
    (f"{TEXT}; task.completion_column=a", "task.prompt_column: missing, and task.completion_col"),
    (f"{TEXT}; task.chat_template=no.jinja", "task.chat_template: the file no.jinja does not exis"),
    (f"{NO_SET}; task.mixture={{}}", "set it, task.train_files or task.mixture"),
    (f"{NO_SET}; task.train_files=a; {MIXTURE}", "task.mixture: cannot be combined w"),
    (f"{NO_SET}; task.mixture={{a: {{weight: 1}}}}", "task.mixture.a.files: must be set, or datas"),
    (
        f"{NO_SET}; {MIXTURE[:-2]}, dataset: b}}}}",
        "task.mixture.a.files: must be set, or dataset, ",
    ),
    (
        f"{NO_SET}; {MIXTURE[:-2]}, split: b}}}}",
        "a.split: has no effect without task.mixture.a.dat",
    ),
    ("task.dataset=a/b; task.splits={test: test}", "task.splits: names no split for train; name"),
    ("task.dataset=null; task.train_files=a; task.revision=b", "no effect without task.dataset; s"),
    ("task.dataset=glue/sst2; task.splits={train: a}", "task.splits: not supported with task.data"),
    (f"{NO_SET}; task.streaming=true; train.max_steps=3; {MIXTURE}", "with task.strea"),
]
STREAMS = [
    ("train.max_steps=null", "train.max_steps: missing, and a stream (task.streaming) has no end"),
    ("teacher.finetune.num_train_epochs=2", "teacher.finetune.max_steps: missing, and a stream (t"),
    ("baselines=[alone]; alone={num_train_epochs: 2}", "alone.max_steps: missing, and a stream (t"),
    ("task.validation_files=null", "no share of a stream can be held out; set task.validation_fil"),
    ("task={type: mlm, streaming: true, dataset: glue/sst2}", "task.streaming: not supported wit"),
    ("task.tokenizer={type: bpe}", "task.tokenizer: cannot be trained on a stream; set"),
    ("task.type=causal_lm; teacher.cache=c", "teacher.cache: cannot be combined with task.streami"),
]
ROUTES = [
    ("task.teacher_column=t", "task.teacher_column: not supported by method single; remove it"),
    (f"{NO_SET}; {A}}}", "task.mixture.a.teacher: not supported by method singl"),
    (ROUTED, "task.teacher_column: missing, and every row names"),
    (f"{ROUTED}; task.dataset=null; {A}, b: {{files: b, weight: 1}}}}", "b.teacher: missing, and"),
    (f"{ROUTED}; task.dataset=null; {A}}}; task.teacher_column=t", "is not read, because every so"),
    (f"{ROUTED}; task.teacher_column=t; task.dataset=glue/sst2", "task.teacher_column: not suppor"),
    (f"{ROUTED}; task.teacher_column=t; eval.losses=true", "eval.losses: only training rows name "),
]
MODELS = [
    ("teacher=null", "teacher: missing, and method single needs one; set teacher.model"),
    ("method.name=finetune; objective=null", 'teacher: method "finetune" learns only from the lab'),
    ("teachers=[{name: a, model: m}]; method.teacher=a", "teachers: teacher is set too; move it i"),
    ("teacher.cache_draws=4; task.type=causal_lm", "teacher.cache_draws: has no effect without "),
    ("student.model=from_teacher", 'student.model: "from_teacher": set student.layers, or m'),
    ("student.layers=[2, 2]", "student.layers: 2 is listed twice; list it once"),
    ("student.teacher=a", 'student.teacher: applies only to student.model "from_teacher"; remove'),
    ("student.deepspeed=zero22", 'student.deepspeed: unknown preset "zero22"; did you mean "zero2'),
    ("teacher.deepspeed=zero2", "teacher.deepspeed: zero2.json: ZeRO stage 2 shards gradients and"),
    (
        "teacher.finetune.deepspeed={gradient_clipping: 1}",
        'teacher.finetune.deepspeed sets "gradient_clipping", which megakd takes from '
        "teacher.finetune.max_grad_norm",
    ),
    ("eval.losses=true; teacher.cache=c", "teacher.cache: has no answers for eval.losses; set it"),
    (f"task.type=mlm; {KL}; teacher.cache=c", "teacher.cache: supported only for classification a"),
    ("method={name: knowledge_selection}; teacher.cache=c", "needs more than outputs; set it to"),
    ("student.model={config: {a: 1}}; student.layers=2", "student.layers: a model with random wei"),
    ("student.layers={keep: 2, by: importance}", "student.layers.by: importance is measured in a "),
    (f"{POOL}; method.teacher=a; student={{model: from_teacher, layers: 2}}", "set student.teache"),
]
SERVED_TEACHERS = [
    (f"{SERVED}; teacher.cache=kept", "teacher.server: cannot be combined with teacher.cache, whi"),
    (f"{SERVED}; teacher.finetune={{max_steps: 3}}", "teacher.server: cannot be combined with te"),
    (f"{SERVED}; student.model=from_teacher; {CUT}", "teacher.server: not supported by method min"),
    (f"{SERVED}; rollout={{max_new_tokens: 4, by: teacher}}", "rollout.by: teacher is not loaded"),
    (f"{SERVED}; teacher.model={{config: {{model_type: llama}}}}", "no server can serve Scratch"),
    (f"{SERVED}; task={{type: mlm, dataset: rows}}", "teacher.server: supported only for causal_l"),
    (f"{SERVED}; objective.0.temperature=2", "soft_target_kl needs temperature 1, because teacher"),
    (f"{SERVED}; objective.0.loss=soft_target_jsd", "largest probabilities; use soft_target_kl"),
    (f"{SERVED}; objective.0.loss=hidden_mse", "hidden_mse needs more than outputs, which teacher"),
]
ADAPTERS = [
    ("method={name: knowledge_selection}", "student.lora: not sup"),
    ("student.model={config: {a: 1}}", "student.lora: needs a whole trained student.model; remov"),
    ("student.layers=2", "needs a whole trained student.model; remove student.layers or lora"),
    ("teacher.model=student_base; teacher.dtype=bf16", "teacher.dtype: not supported with teacher"),
    ("teacher.model=student_base; student.lora=null", "without its adapters, and needs student.lo"),
    ("teacher.model=student_base; task={type: classification, dataset: a}", "and task.type mlm or"),
]
LABEL_OPTIONS = {"label_smoothing": 0.1, "count": "rows", "class_weights": "balanced"}
OBJECTIVE = [
    *(
        (
            f"{LONE}; objective=[{{loss: {loss}}}]",
            f"{loss} compares with a teacher, and the run has",
        )
        for loss in ("soft_target_kl", "hidden_cosine", "soft_target_tvd", "embedding_mse")
    ),
    ("objective.0.class_weights=even", "objective[0].class_weights: must be"),
    ("objective.0.class_weights={a: -1}", "class_weights.a: must be greater than or"),
    ("objective.0.class_weights={a: 0, b: 0}", "every weight is 0; set at least one weight above"),
    ("objective.0.label_smoothing=1", "objective[0].label_smoothing: must be less than 1"),
    ("objective.1={loss: hard_mse}", "objective[1].loss: hard_mse supports only task.type regress"),
    (f"{TEXT}; objective.0.loss=soft_target_mse", "soft_target_mse supports only task.type regres"),
    (f"task={{type: regression, dataset: glue/stsb}}; {KL}", "soft_target_kl supports only task.t"),
    ("objective.1={loss: hard_cross_entropy}", '"hard_cross_entropy" is listed 2 times; keep one'),
    (f"{TEXT}; objective=[{KL_ON}, {KL_ON}]", '"soft_target_kl" with on: data is listed 2 times'),
    ("objective.0.weight=0; objective.1.weight=0", "objective: every weight is 0; set at least"),
    (f"{TEXT}; objective.0.on=rollouts", "objective[0].on: rollouts, and this run generates no te"),
    *(
        (
            f"task={{type: {task}, dataset: rows}}; objective=[{{loss: {loss}, on: rollouts}}]",
            f"objective[0].on: supported only for causal_lm, and task.type is {task}; remove",
        )
        for task in ("classification", "mlm")
        for loss in ("hard_cross_entropy", "soft_target_kl")
    ),
    (f"{TEXT}; objective=[{{loss: hidden_mse, on: data}}]", "objective[0].on = "),
    (f"{TEXT}; objective.0.on=rollout", '(got "rollout"); did you mean "rollouts"'),
    *(
        (
            f"{TEXT}; objective=[{{loss: hard_cross_entropy, {name}: {value}}}]",
            f"objective[0].{name}: supported only for classification, and task.type is causal_lm",
        )
        for name, value in LABEL_OPTIONS.items()
    ),
]
TRAIN = [
    ("train.bf16=true; train.fp16=true", "train: bf16 and fp16 are both true, here or in train"),
    ("train.bf16=true; teacher.finetune.fp16=true", "teacher.finetune: bf16 and fp16 are both tru"),
    ("train.bf16=true; baselines=[alone]; alone={fp16: true}", "alone: bf16 and fp16 are both tru"),
    ("baselines=[alone]; alone={bf16: true, fp16: true}", "alone: bf16 and fp16 are both true, h"),
    ("teacher.finetune.collective_timeout=5", 'unknown key; did you mean "train.collective_timeou'),
    ("teacher.finetune.packing=false", 'packing = false: unknown key; did you mean "train.packing'),
    ("train.torch_compile=true", 'did you mean "fused_layers"?'),
    ("train.packing=false", "train.packing: supported only for causal_lm, and task.type is cl"),
    ("train.activation_offload=true", "train.activation_offload: has no effect without train"),
    ("train.early_stopping_patience=2", "train.early_stopping_patience: has no effect without e"),
    ("teacher.finetune={early_stopping_patience: 2}", "teacher.finetune.early_stopping_patience:"),
    ("alone={max_steps: 3}", "alone: baselines does not list alone; add baselines: [alone]"),
    ("baselines=[alone, alone]", "baselines: alone is listed twice"),
    ("baselines=[allone]", 'has no baseline "allone"; did you mean "alone"? (known: alone, tf'),
    ("baselines=[direct]", 'has no baseline "direct" (known: alone, tfidf, frozen)'),
    ("eval.keep_best=true", "eval.keep_best: has no effect without eval.eval_st"),
    ("eval.latency.tokens=512", 'eval.latency: must be true or false (got {"tokens": 512})'),
    ("eval.metric=f1_makro", 'task.type classification has no metric "f1_makro"; did you mean "f1'),
    ("eval.metrics=[accuracy, pearson]", "eval.metrics[1]: task.type classification has no metric"),
]
BUDGET = [
    ("train.tokens_per_rank=63", "train.tokens_per_rank: 63 is less than task.max_length 64"),
    ("train.packing=false", "train.tokens_per_rank: packs rows, and train.packing is false; re"),
    ("task.type=mlm", "train.tokens_per_rank: supported only for causal_lm, and task.type is mlm"),
    ("teacher.cache=c", "teacher.cache: cannot be combined with train.tokens_per_rank, which pack"),
    ("objective=[{loss: hidden_mse, positions: first}]", "hidden_mse is averaged over rows; rem"),
    ("objective=[{loss: relation_fsp}]", "relation_fsp is averaged over rows; remove the term or"),
    ("task.streaming=true; train.max_steps=3", "train.tokens_per_rank: cannot be combined with t"),
    ("teacher.finetune={max_steps: 3, tokens_per_rank: 32}", "32 is less than task.max_length 64"),
    ("task.max_length=512; teacher.finetune={max_steps: 3}", "is less than task.max_length 512"),
]
# The section `rollout`, further overrides, and a part of the message.
ROLLOUT = [
    ("mix: 0.5", "objective.0.on=rollouts", "no term learns from data, whic"),
    ("from_step: 3", "objective.0.on=rollouts", "objective: no term learns from data, which rollo"),
    ("by: student", "objective.0.on=data", "objective: no term learns from rollouts, which rollou"),
    ("by: student", f"{KL[:-1]}, {KL_ON}]", "objective[1].on: data, and"),
    ("mix: 0", f"{KL[:-1]}, {KL_ON[:-5]}rollouts}}]", "with rollout.mix 0 no step learns from"),
    ("by: student", HARD, "objective[1].on: null, so that hard"),
    ("mix: 0.5", f"{HARD[:-2]}, on: rollouts}}]", "objective[1].on: rollouts, so that hard_cross_"),
    ("from_step: 3", HARD, "texts that the student writes as labels; set on"),
    ("by: mentor", "seed=1", 'rollout.by: there is no teacher "mentor"'),
    ("by: student", "eval.generation={max_new_tokens: 4, answer: '(a)'}", "generation.answer: has"),
    ("by: student", "teacher.cache=c", "teacher.cache: cannot be combined with rollout, whose te"),
    ("by: a", f"{POOL}; method.teacher=b", "rollout.by: a is not loaded, because method.teacher"),
    ("by: teacher", "teacher.model=student_base; student.lora={}", "teacher is the student withou"),
    ("by: student", f"student.model=from_teacher; {CUT}", "rollout: not supported by met"),
    ("by: student", "task.streaming=true; train.max_steps=3", "rollout: cannot be combined with t"),
    (f"server: {{{URL}, {PUSH}}}", "student.model={config: {a: 1}}", "server.model: missing, and"),
    ("by: student", "task={type: mlm, dataset: rows}", "rollout: supported only for causal_lm, an"),
]
# The section `rollout.server`, further keys of `rollout`, and a part of the message.
SERVER = [
    ("push: adapter, folder: w", "", "rollout.server.push: adapter needs student.lora"),
    ("push: full", "", "rollout.server.folder: missing with push: full"),
    ("push: none, folder: w", "", "rollout.server.folder: is not used with push: no"),
    ("push: full, folder: w", ", by: teacher", "rollout.by is teacher, which does not"),
]
# Values that a key cannot have.
VALUES = [
    ("task.type=masked_lm", "task.type: must be 'classification', 'regression', 'mlm' or 'cau"),
    ("task.type=mlm; task.mlm_probability=0", "task.mlm_probability: must be greater than 0"),
    ("task.type=mlm; task.mlm_probability=1.5", "task.mlm_probability: must be less than or equal"),
    ("log.tensorboard=true", 'log.tensorboard = true: unknown key; did you mean "report_to"?'),
    ("save.push_to_hub=me", "save.push_to_hub: must be a Hub repository of the form user/name"),
    ("task.train_files=[]", "task.train_files"),
    ('task.dataset=null; task.train_files=""', 'names nothing (got ""); give a name, or remove'),
    ("task.evaluation_sets={test: a}", "and not be train, validation or test"),
    ("task.evaluation_sets={a b: a}", "the name of an evaluation set must consist of letters"),
    ("task.mixture={train: {files: a, weight: 1}}", "the name of a source of a mixture must"),
    ("task.mixture={a: {files: a, weight: 0}}", "task.mixture.a.weight: must be greater than 0 (g"),
    ("train.tokens_per_rank=7", "train.tokens_per_rank: must be greater than or equal to 8 (got 7"),
    ("rollout={mix: 1}", "rollout.max_new_tokens: missing"),
    ("rollout={max_new_tokens: 0}", "rollout.max_new_tokens: must be greater than or equal to 1"),
    *(
        (f"rollout={{max_new_tokens: 4, {section}}}", text)
        for section, text in {
            "mix: {rollout: 0.5, data: 0.5}": "rollout.mix: must be a valid number",
            "mix: 1.5": "rollout.mix: must be less than or equal to 1 (got 1.5)",
            "sampling: {top_p: 0}": "rollout.sampling.top_p",
            "sampling: {temperature: -1}": "rollout.sampling.temperature",
            f"server: {{{URL}, push: some}}": "server.push",
            f"server: {{{URL}}}": "server.push: missing",
        }.items()
    ),
    *(
        (f"rollout={{max_new_tokens: 4, server: {{url: [{url}], {NO_PUSH}}}}}", text)
        for url, text in {
            "": "rollout.server.url",
            "'a:8000'": "must be of the form http://host:port",
            "'http://::1:8000'": "must be of the form http://host:port",
            "'http://a:99999'": "must be of the form http://host:port",
            "'http://a..b:1'": "must be of the form http://host:port",
            "'http://a:1/\u00e4'": "must be of the form http://host:port",
            "'http://a:1', 'http://a:1/'": "http://a:1 is listed twice; list it once",
        }.items()
    ),
]
LINES = [
    *(*VALUES, *TASK, *ROUTES, *MODELS, *OBJECTIVE, *TRAIN),
    *((f"{STREAM}; {overrides}", text) for overrides, text in STREAMS),
    *((f"{TEXT}; {overrides}", text) for overrides, text in SERVED_TEACHERS),
    *((f"{PACKED}; {overrides}", text) for overrides, text in BUDGET),
    *((f"{TEXT}; student.lora={{}}; {overrides}", text) for overrides, text in ADAPTERS),
    *(
        (f"{TEXT}; rollout={{max_new_tokens: 4, {section}}}; {more}", text)
        for section, more, text in ROLLOUT
    ),
    *(
        (f"{TEXT}; rollout={{max_new_tokens: 4, server: {{{URL}, {server}}}{more}}}", text)
        for server, more, text in SERVER
    ),
]


@pytest.mark.parametrize(("overrides", "text"), LINES)
def test_settings_that_cannot_be_or_contradict_each_other_are_refused(run_file, overrides, text):
    message = message_of(run_file, *overrides.split("; "))

    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        "eval.keep_best=true; eval.eval_steps=5",
        f"task.type=mlm; task.mlm_probability=0.3; {KL}",
        STREAM,
        f"{STREAM}; task.type=causal_lm",
        f"{STREAM}; task.validation_files=null; task.max_eval_examples=5",
        "train.bf16=true; teacher.finetune={bf16: false, fp16: true}",
        f"{TEXT}; objective=[{{loss: soft_target_jsd}}, {{loss: hidden_mse}}]",
        "task={type: regression, dataset: x.csv}; objective=[{loss: soft_target_mse}]",
        "task.labelled_examples=5; objective.0.weight=0",
        "teacher.deepspeed=zero3; student.deepspeed=teacher_zero0",
        "train.activation_offload=true; train.gradient_checkpointing=true",
        # A teacher with another schedule does not inherit the options of the schedule.
        "train.lr_scheduler_type=polynomial; train.lr_scheduler_kwargs={power: 2}; "
        "teacher.finetune={lr_scheduler_type: cosine}",
        f"{TEXT}; objective.0.on=data",
        f"{TEXT}; {SERVED}",
        f"{PACKED}; teacher.finetune={{max_steps: 3}}",
        f"{TEXT}; rollout={{max_new_tokens: 4, server: {{{URL}, {PUSH}}}}}",
        f"{TEXT}; rollout={{max_new_tokens: 4, server: {{url: ['http://[::1]:8000'], {NO_PUSH}}}}}",
        # Labels of the data, and texts of another model as labels.
        f"{TEXT}; rollout={{max_new_tokens: 4, from_step: 3}}; {HARD_ON_DATA}",
        f"{TEXT}; rollout={{max_new_tokens: 4}}; {HARD[:-2]}, weight: 0}}]",
        *(
            f"{TEXT}; rollout={{max_new_tokens: 4, {source}}}; {HARD}"
            for source in ("by: teacher", "mix: 0")
        ),
        f"{TEXT}; student.model=from_teacher; method={{name: shrink, parameters: 1M}}; "
        f"rollout={{max_new_tokens: 4, from_step: 3}}; {HARD_ON_DATA}",
    ],
)
def test_settings_near_those_refusals_are_accepted(run_file, overrides):
    assert load_config(run_file, overrides.split("; "))
