"""Settings of mixed vocabularies that cannot work."""

from __future__ import annotations

import pytest
from mixed_runs import SENTENCEPIECE, mixed
from tiny_runs import bert

WRONG = {
    "task": ({"task": {"type": "causal_lm"}}, "needs mlm"),
    "p": ({"method": {"p": 1.5}}, "method.p"),
    "version 1 option": (
        {"method": {"version": 2, "projections": "down"}},
        "method.projections: an option of version 1, and method.version is 2",
    ),
    "version 2 option": (
        {"method": {"teacher_steps": 5}},
        "method.teacher_steps: an option of version 2",
    ),
    "depth": (
        {"student": {"model": bert(1, 8)}},
        "the teacher has 2 layers and the student 1",
    ),
    "family": (
        {
            "student": {
                "model": {
                    "config": {
                        "model_type": "electra",
                        "num_hidden_layers": 2,
                        "hidden_size": 8,
                        "embedding_size": 8,
                        "num_attention_heads": 2,
                        "intermediate_size": 16,
                    }
                }
            }
        },
        "of type bert and the student of type electra",
    ),
    "size": (
        {"method": {"student_vocabulary": {"size": 5000}}},
        "method.student_vocabulary.size is 5000",
    ),
    "small size": ({"method": {"student_vocabulary": {"size": 10}}}, "method.student_vocabulary"),
    "words": (
        {"method": SENTENCEPIECE},
        "a unigram vocabulary has other words than the teacher's",
    ),
    "teacher's words": (
        {"task": {"tokenizer": {"type": "bpe", "vocab_size": 300}}},
        "method.student_vocabulary: the two vocabularies cut the text into different words",
    ),
    "stream": ({"task": {"streaming": True}}, "task.streaming"),
    "objective": ({"objective": [{"loss": "hard_cross_entropy"}]}, "objective: mixed_vocabulary"),
    "student's folder": ({"student": {"model": "some/model"}}, "starts from random weights"),
    "student's size": (
        {"student": {"model": bert(2, 8, vocab_size=50)}},
        "student.model.config.vocab_size: 50, and method.student_vocabulary.size is 100",
    ),
    "no tables": (
        {"method": {"p": 0.0, "embeddings": True}},
        "method.embeddings: compares tables",
    ),
    "nothing to read": (
        {"method": {"version": 2, "p": 0.0}},
        "method.p: 0, and in version 2 the student starts from the pieces that its teacher has",
    ),
    "no comparison": (
        {"method": {"projections": "dual", "epsilon": 3.0}},
        "method.epsilon: has no effect, because method.projections dual compares nothing",
    ),
    "alone": (
        {"method": {"projections": "none", "teacher_learning_rate": 0.1}},
        "method.teacher_learning_rate: has no effect",
    ),
    "no rate": (
        {"method": {"teacher_learning_rate": 0.1}, "train": {"learning_rate": 0.0}},
        "method.teacher_learning_rate: 0.1 follows the schedule of train.learning_rate",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_any_training(one_rank, tmp_path, name):
    sections, message = WRONG[name]

    said = one_rank.train("--config", mixed(tmp_path, **sections))

    assert said.code != 0
    assert message in said.err
    assert not said.loaded
    assert "Traceback" not in said.err
