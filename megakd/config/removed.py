"""Keys of the release before this one that are gone, with what takes their place."""

from __future__ import annotations

from collections.abc import Mapping

REMOVED: Mapping[str, str] = {
    "teacher.label_order": "gone; write the data's labels into id2label of the model's config.json",
    "teacher.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "student.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "task.whole_word_masking": "gone; each token is chosen for itself, remove the key",
    "task.encoded": "gone; `megakd encode` fills the cache that a run reads, remove the key",
    "method.name: takd": "; gone: train each teacher as a student, and give it as the teacher;",
    "method.name: mt_bert": "; gone: use mean_of_teachers;",
    "method.target_sparsity": "no key of this method; shrink cuts to parameters, flops or speedup",
    "method.candidates": "gone; shrink keeps the fewest layers, remove the key",
    "method.trial_steps": "gone; shrink has no trials, remove the key",
    "method.repair_steps": "gone; set train.max_steps",
    "method.on_policy_steps": "gone; train.max_steps counts all steps, and rollout.from_step those "
    "on the data",
    "method.assistant": "gone; shrink cuts once, remove the key",
    "method.timing": "gone; shrink times on the device of the run, remove the key",
    "method.allocation: global_raw": "; gone: use global;",
    "rollout.server.kind": "gone; serve with vLLM, and remove the key",
    "teacher.server.kind": "gone; serve with vLLM, and remove the key",
    "teacher.server.states": "gone; servers answer with teacher.server.top_k probabilities",
    "teacher.micro_batches_per_call": "gone; joins_micro_batches is true (all of a step) or false",
    "rollout.mix_per": "gone; each step has one source, as in GKD, remove the key",
    "rollout.files": "gone; give texts that exist as task.train_files, with prompt and completion",
    "rollout.keep_texts": "gone; texts since the oldest checkpoint stay; remove the key",
    "eval.latency": "its keys are gone: models are timed at 1 and 32 texts (a decoder at 1)",
    "save.int8": "gone; megakd export --format onnx --int8 writes a graph with int8 weights",
    "task.data_dir": "gone; name GLUE's files in task.train_files and task.validation_files, with "
    "task.text_columns and task.label_column",
    "task.dataset: pydocs": "gone; set a folder that `python launch/pydocs.py labels` writes",
    "method.score": "gone; units are ranked by their sensitivity; remove the key",
    "method.sensitivity_beta": "gone; the decay of the average is 0.85; remove the key",
    "method.uncertainty_beta": "gone with score: platon; remove the key",
    "method.monotone": "gone; removed units never return; remove the key",
    "method.residual": "gone; homodistil narrows hidden states",
    "method.target_may_win": "gone; the target may win every trial; remove the key",
    "method.sampled_candidates": "gone; all candidates learn in every step; remove the key",
    "method.rank_exponent": "gone; weights are the ranks; remove the key",
    "method.pilot_steps": "gone; pilots take as many steps as the student; remove the key",
    "method.version": "gone; teacher and student learn together, as in version 1; remove the key",
    "method.teacher_steps": "gone with version 2; remove the key",
    "method.table": "gone with version 2; remove the key",
    "method.embeddings": "gone; tables are compared with the layers; remove the key",
    "method.vectors": "gone; norms and biases are compared too; remove the key",
    "method.projection_ratio": "gone; set method.epsilon",
    "method.patient_kd_weight": "gone; it is 10; remove the key",
    "method.threshold": "gone; a hard action uses the kinds of at least 0.5; remove the key",
    "method.noise": "gone; the noise of a phase is 0.2; remove the key",
    "method.restraint": "gone; it is 0.02; remove the key",
    "method.gamma_on": "gone; gamma discounts what follows a phase; remove the key",
    "method.updates": "gone; a selector learns 32 steps after a phase; remove the key",
    "method.hidden": "gone; a selector's layers have width 64; remove the key",
}
"""By the path of a key, or by `path: value` for a choice of it."""
