"""Names of other libraries for settings of a run config, and the corresponding keys of megakd."""

from __future__ import annotations

from collections.abc import Iterable

SYNONYMS: dict[str, tuple[str, ...]] = {
    "adam_beta_1": ("train.adam_beta1",),
    "adam_beta_2": ("train.adam_beta2",),
    "adam_eps": ("train.adam_epsilon",),
    "batch_size": ("train.per_device_train_batch_size",),
    "block_size": ("task.max_length",),
    "clip_grad_norm": ("train.max_grad_norm",),
    "dataset_config_name": ("task.dataset_config",),
    "dataset_name": ("task.dataset",),
    "dataset_path": ("task.dataset",),
    "epochs": ("train.num_train_epochs",),
    "eval_batch_size": ("eval.per_device_eval_batch_size",),
    "eval_strategy": ("eval.eval_steps",),
    "evaluation_strategy": ("eval.eval_steps",),
    "grad_accum": ("train.gradient_accumulation_steps",),
    "grad_accumulation_steps": ("train.gradient_accumulation_steps",),
    "grad_clip": ("train.max_grad_norm",),
    "gradient_accumulation": ("train.gradient_accumulation_steps",),
    "gradient_clipping": ("train.max_grad_norm",),
    "hub_model_id": ("save.push_to_hub",),
    "hub_private_repo": ("save.hub_private",),
    "label_column_name": ("task.label_column",),
    "learning_rate_scheduler": ("train.lr_scheduler_type",),
    "load_best_model_at_end": ("eval.keep_best",),
    "logging_dir": ("output_dir",),
    "lr": ("train.learning_rate",),
    "lr_scheduler": ("train.lr_scheduler_type",),
    "max_epochs": ("train.num_train_epochs",),
    "max_eval_samples": ("task.max_eval_examples",),
    "max_seq_len": ("task.max_length",),
    "max_seq_length": ("task.max_length",),
    "max_train_steps": ("train.max_steps",),
    "metric_for_best_model": ("eval.metric",),
    "micro_batch_size": ("train.per_device_train_batch_size",),
    "mixed_precision": ("train.bf16", "train.fp16"),
    "model_max_length": ("task.max_length",),
    "model_name": ("student.model", "teacher.model"),
    "model_name_or_path": ("student.model", "teacher.model"),
    "model_path": ("student.model", "teacher.model"),
    "n_epochs": ("train.num_train_epochs",),
    "num_epochs": ("train.num_train_epochs",),
    "num_steps": ("train.max_steps",),
    "num_train_steps": ("train.max_steps",),
    "num_warmup_steps": ("train.warmup_steps",),
    "optimizer": ("train.optim",),
    "per_device_batch_size": ("train.per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("eval.per_device_eval_batch_size",),
    "per_gpu_train_batch_size": ("train.per_device_train_batch_size",),
    "pretrained_model_name_or_path": ("student.model", "teacher.model"),
    "random_seed": ("seed",),
    "resume": ("train.resume_from_checkpoint",),
    "save_strategy": ("save.save_steps",),
    "scheduler": ("train.lr_scheduler_type",),
    "scheduler_type": ("train.lr_scheduler_type",),
    "seq_length": ("task.max_length",),
    "sequence_length": ("task.max_length",),
    "student_model": ("student.model",),
    "student_model_name_or_path": ("student.model",),
    "task_name": ("task.dataset",),
    "tensorboard": ("log.report_to",),
    "teacher_model": ("teacher.model",),
    "teacher_model_name_or_path": ("teacher.model",),
    "text_column": ("task.text_columns",),
    "text_column_name": ("task.text_columns",),
    "tokenizer_name": ("task.tokenizer",),
    "tokenizer_name_or_path": ("task.tokenizer",),
    "torch_dtype": ("teacher.dtype", "train.bf16", "train.fp16"),
    "train_batch_size": ("train.per_device_train_batch_size",),
    "train_micro_batch_size_per_gpu": ("train.per_device_train_batch_size",),
    "training_steps": ("train.max_steps",),
    "warmup": ("train.warmup_steps", "train.warmup_ratio"),
    "warmup_proportion": ("train.warmup_ratio",),
    "wd": ("train.weight_decay",),
}
"""Keys of megakd by common names, such as those of Hugging Face, DeepSpeed and Lightning."""


def synonyms(word: str, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the keys that `word` may mean; only keys of its own section if there are any.

    Args:
        word: the key as written, in any case, with - or _.
        known: keys of the section that holds the word.
    """
    meant = SYNONYMS.get(word.lower().replace("-", "_"), ())
    here = {key.rpartition(".")[2] for key in meant}.intersection(known)
    return tuple(sorted(here)) or meant
