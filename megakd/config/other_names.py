"""Names of other tools and other spellings, for the messages about unknown keys."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Keys of megakd: their names in transformers, TRL, axolotl and DeepSpeed.
_OTHER_NAMES = {
    "eval.eval_steps": "eval_strategy evaluation_strategy",
    "eval.keep_best": "load_best_model_at_end",
    "eval.metric": "metric_for_best_model",
    "eval.per_device_eval_batch_size": "eval_batch_size",
    "log.report_to": "logger tensorboard use_wandb wandb_project",
    "objective": "alpha beta kd_alpha kd_loss kd_temperature kd_weight loss_functions",
    "rollout.by": "seq_kd",
    "rollout.max_new_tokens": "max_completion_length",
    "rollout.mix": "lambda lmbda",
    "rollout.prompt_tokens": "max_prompt_length",
    "rollout.server": "use_vllm vllm_mode vllm_server_base_url vllm_server_host",
    "save.hub_private": "hub_private_repo",
    "save.push_to_hub": "hub_model_id",
    "save.save_steps": "save_strategy",
    "seed": "data_seed random_seed",
    "student.deepspeed": "zero_stage",
    "student.lora": "adapter peft_config use_peft",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.r": "lora_r lora_rank",
    "student.lora.target_modules": "lora_target_linear lora_target_modules",
    "student.model": "base_model student_model student_model_name_or_path",
    "student.model teacher.model": "model_name model_name_or_path model_path",
    "task.chat_template": "chat_template_path",
    "task.dataset": "data_path dataset_name dataset_path task_name",
    "task.dataset task.mixture": "dataset_mixture datasets",
    "task.dataset_config": "dataset_config_name",
    "task.label_column": "label_column_name",
    "task.max_eval_examples": "max_eval_samples val_set_size",
    "task.max_length": "block_size cutoff_len max_seq_len max_seq_length sequence_len",
    "task.train_files task.validation_files task.test_files": "data_files",
    "task.text_columns": "dataset_text_field text_column text_column_name",
    "task.type": "task_type",
    "task.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "task.train_on": "assistant_only_loss completion_only_loss train_on_inputs",
    "teacher.dtype": "teacher_model_init_kwargs",
    "teacher.dtype train.bf16 train.fp16": "torch_dtype",
    "teacher.model": "teacher_model teacher_model_name_or_path",
    "train.bf16 train.fp16": "mixed_precision",
    "train.collective_timeout": "ddp_timeout",
    "train.early_stopping_patience": "early_stopping patience",
    "train.fused_layers": "torch_compile",
    "train.gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "train.gradient_checkpointing": "activation_checkpointing",
    "train.kernels": "use_liger use_liger_kernel",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping",
    "train.max_steps": "max_train_steps num_steps num_train_steps",
    "train.num_train_epochs": "epochs max_epochs num_epochs",
    "train.optim": "optimizer",
    "train.packing": "pack_sequences sample_packing",
    "train.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size "
    "train_micro_batch_size_per_gpu",
    "train.tokens_per_rank": "padding_free",
    "train.warmup_steps train.warmup_ratio": "num_warmup_steps warmup",
    "train.weight_decay": "wd",
}

SYNONYMS = {
    name: tuple(keys.split()) for keys, names in _OTHER_NAMES.items() for name in names.split()
}
"""Keys of megakd by common names."""


def synonyms(word: str, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the keys that `word` may mean; only keys of its own section if there are any."""
    meant = SYNONYMS.get(word.lower().replace("-", "_"), ())
    here = {key.rpartition(".")[2] for key in meant}.intersection(known)
    return tuple(sorted(here)) or meant


# By key: values of megakd, and what other tools call them, in small letters alone.
_OTHER_VALUES = {
    "loss": {
        '"hard_cross_entropy"': "ce crossentropy nll sft",
        '"soft_target_kl"': "forwardkl kd kl kldiv kld",
        '"soft_target_mse" (logits) or "hidden_mse"': "l2 mse",
    },
    "type": {
        '"causal_lm"': "causallm chat clm instruction languagemodeling sft textgeneration",
        '"mlm"': "fillmask maskedlm maskedlanguagemodeling",
        '"classification"': "multilabel nli sentiment seqcls",
        '"regression"': "scoring stsb",
    },
    "name": {
        '"single" with a section rollout, as in launch/examples/gkd.yaml': "gkd onpolicy",
        '"finetune"': "sft",
    },
}


def meant_value(key: str, value: object) -> str:
    """Return the message that names the value that is meant, or an empty string."""
    name = _plain_name(value).replace("_", "").removesuffix("loss")
    values = _OTHER_VALUES.get(key, {}).items()
    return next((f"did you mean {ours}?" for ours, names in values if name in names.split()), "")


# Names that other tools have for keys and tasks, and what to use in megakd, which has none.
_MISSING = {
    r"(sequence|context|ulysses|ring)_?parallel.*|[cs]p(_size|_degree)?|ulysses.*|ring_.*": "no "
    "parallelism within a text; lower task.max_length, or set train.gradient_checkpointing",
    r"(num_)?(tensor|pipeline|model|expert)_?(model_)?parallel.*|(auto)?_?[tpe]p(_size)?": (
        "no tensor, pipeline or expert parallelism; student.deepspeed: zero3 and teacher.deepspeed:"
        " teacher_zero3 split weights over GPUs (give a server such options where it starts)"
    ),
    r"resume.*": "no key to go on, a run does so by itself; to begin anew, set another output_dir",
    r"fsdp.*|fully_shard.*": "no FSDP; student.deepspeed: zero3 shards weights in the same way",
    r"ner|pos|(token|word)_?(cl|label).*|(ner|pos|sequence)_(label|tag).*|named_.*|tagg.*": (
        "no task with labels of words; distil the encoder with task.type: mlm, and train final/ in "
        "transformers for them"
    ),
    r"((sentence|text|semantic)_?)?(embed|embedd?ings?|similarity|transformers?|textual.*)|sts|"
    r"retriev(al|er)|contrastive.*|re_?rank.*|(bi|cross)_?encoder|feature_extraction": "no task of "
    "embeddings; distil the encoder with task.type: mlm, and train final/ in sentence-transformers,"
    " or learn scores of pairs with task.type: regression and two task.text_columns",
    r"(extractive_|question_)?(qa|answering)|seq_?2_?seq.*|summari[sz].*|translat.*|"
    r"text_?2_?text.*|encoder_decoder": "no such task; a decoder learns it with task.type: "
    "causal_lm from rows with a prompt and a completion",
}


def missing(word: object) -> str:
    """Return what to use if megakd has nothing that other tools call `word`, else an empty text."""
    name = _plain_name(word)
    use = next((use for names, use in _MISSING.items() if re.fullmatch(names, name)), "")
    return use and f"megakd has {use}"


def _plain_name(word: object) -> str:
    # TokenClassification, token-classification and TOKEN_CLASSIFICATION are one name.
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", "_", str(word)).lower().strip("_")
    return re.sub("^(auto_)?model_for_", "", name)
