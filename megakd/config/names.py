"""Keys by the names of other libraries, and what takes the place of keys that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    "student.deepspeed": "fsdp fsdp_config zero_stage",
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
    "task.text_columns": "dataset_text_field text_column text_column_name",
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


_WITHOUT_A_CHOICE = (
    "method.candidates method.importance_batch_size method.importance_split "
    "method.selector_learning_rate method.trial_steps rollout.server.time_limit "
    "teacher.cache_seed teacher.server.time_limit train.early_stopping_threshold"
)
REMOVED: Mapping[str, str] = {
    **dict.fromkeys(_WITHOUT_A_CHOICE.split(), "gone, without a choice now; remove the key"),
    "eval.latency": "its keys are gone: models are timed at 1 and 32 texts (a decoder at 1)",
    "eval.positive_label": "gone; list the label second in task.labels",
    "method.metric": "gone; set eval.metric",
    "method.name: gkd": "; GKD is method.name=single with a section rollout, see "
    "launch/examples/gkd.yaml;",
    "method.name: mt_bert": "; gone: use mean_of_teachers;",
    "method.name: takd": "; gone: train each teacher as a student, and give it as the teacher;",
    "method.on_policy_steps": "gone; train.max_steps counts all steps, and rollout.from_step those "
    "on the data",
    "method.projection_ratio": "gone; set method.epsilon",
    "method.repair_steps": "gone; set train.max_steps",
    "method.student_vocabulary": "its keys are gone: give the size, such as 4928",
    "method.target_sparsity": "no key of this method; shrink cuts to parameters, flops or speedup",
    "objective.t_squared": "gone; a soft target is multiplied by temperature², divide its weight",
    "rollout.files": "gone; give texts that exist as task.train_files, with prompt and completion",
    "rollout.mix_per": "gone; each step has one source, as in GKD, remove the key",
    "rollout.server.kind": "gone; serve with vLLM, and remove the key",
    "save.int8": "gone; megakd export --format onnx --int8 writes a graph with int8 weights",
    "student.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "task.data_dir": "gone; name GLUE's files in task.train_files and task.validation_files, with "
    "task.text_columns and task.label_column",
    "task.encoded": "gone; `megakd encode` fills the cache that a run reads, remove the key",
    "teacher.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "teacher.label_order": "gone; write the data's labels into id2label of the model's config.json",
    "teacher.micro_batches_per_call": "gone; joins_micro_batches is true (all of a step) or false",
    "teacher.server.kind": "gone; serve with vLLM, and remove the key",
    "teacher.server.states": "gone; servers answer with teacher.server.top_k probabilities",
    "train.resume_from_checkpoint": "gone; a run goes on by itself; to begin anew, set another "
    "output_dir",
}
"""By the path of a key, or by `path: value` for a choice of it."""
