"""Students with a small vocabulary of their own, and teachers that read both vocabularies.

Zhao et al. 2019 (arXiv 1909.11687 v1): teacher and student learn masked tokens together. Each word
of the teacher's text is cut with the student's vocabulary with probability `p`, and the weights of
both models are compared through shared projections.

Differs from the paper: the weight of the cross-entropies beside the sum of squared errors was not
found, and is the number of compared elements by default (`epsilon`). Whether the tables of
embeddings are compared was not found either; here they are. Nor was how the second table starts;
here its values are random. The paper's teacher learns next sentences too; here it learns masked
tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.config.options import OneTeacherOptions
from megakd.config.task import STUDENT
from megakd.config.terms import STRICT, Fraction, HiddenCosine, MethodTerm, Positive, Shape
from megakd.data.batch import Pass
from megakd.errors import TeacherError
from megakd.stage import Constant, Stage, StageResult
from megakd.training.lab import Lab

PATIENT_KD = "patient_kd"
PATIENT_KD_WEIGHT = 10.0
"""Weight of the hidden states in the baseline `patient_kd`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ParameterProjection(MethodTerm):
    """Squared error between weights of the student and of a teacher that learns beside it.

    direction: `down` maps the teacher's weights to the student's shapes, `up` the reverse.
    epsilon: divisor of the sum of squared errors; null: the number of compared elements.
    """

    loss: str = "parameter_projection"
    direction: Literal["down", "up"]
    epsilon: Positive | None = None

    def check(self, student: Shape, teacher: Shape | None, families: Sequence[str]) -> None:
        if teacher is None:
            return
        if student.layers != teacher.layers:
            raise TeacherError(
                "method.projections: compares the models layer by layer, and the teacher has "
                f"{teacher.layers} layers and the student {student.layers}; set the "
                f"student's number of layers to {teacher.layers}, or set method.projections to dual"
            )
        if len(set(families)) > 1:
            ours, other = families
            raise TeacherError(
                "method.projections: compares weights by name, and the teacher is a model of type "
                f"{other} and the student of type {ours}; set model_type of the student to "
                f"{other}, or set method.projections to dual"
            )

    def group(self) -> Any:
        from megakd.methods.mixed_vocabulary.parameter_projections import ParameterProjections

        return ParameterProjections(self)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MixedVocabularyConfig(OneTeacherOptions):
    """The student has a small vocabulary of its own, which the teacher learns to read too.

    student_vocabulary: pieces of the vocabulary, with five special tokens; a lower-cased WordPiece,
        which is trained on the training text. 4928 is the size of the paper.
    p: probability of each word of the teacher's text to be cut with the student's vocabulary.
    projections: `dual` trains both models and compares nothing; `down` maps the teacher's weights
        to the student's shapes; `up` maps the student's weights to the teacher's shapes.
    epsilon: weight of the cross-entropies beside the sum of squared errors; null: the number of
        compared elements, so that errors are averaged.
    teacher_learning_rate: learning rate of the teacher; null: as the student's.
    """

    student_vocabulary: Annotated[int, Field(ge=100)] = 4928
    p: Fraction = 0.5
    projections: Literal["dual", "down", "up"] = "down"
    epsilon: Positive | None = None
    teacher_learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @property
    def looks_into_teacher(self) -> bool:
        """True: the teacher learns too."""
        return True

    @property
    def own_vocabulary(self) -> int:
        return self.student_vocabulary

    def student_tokenizer(self, splits: Any, teacher: Any, *, cache_dir: Path) -> Any:
        """Train the student's tokenizer, and check that the teacher's can be mixed with it."""
        from megakd.methods.mixed_vocabulary.shared_words import (
            check_special_tokens,
            load_student_tokenizer,
        )

        check_special_tokens(teacher, "the teacher's tokenizer")
        return load_student_tokenizer(self.student_vocabulary, splits, cache_dir=cache_dir)

    def rows(self, config: Any, splits: Any, pair: Any, *, cache_dir: Path) -> Any:
        from megakd.methods.mixed_vocabulary.mixed_text import encode_mixed

        return encode_mixed(splits.train, pair, config.task, cache_dir=cache_dir)

    def mixed(self, stage: Any) -> dict[str, float]:
        return {**dict.fromkeys(stage.teachers, 0.0), **dict.fromkeys(stage.beside, self.p)}

    def batches(self, parts: Any) -> Any:
        from megakd.methods.mixed_vocabulary.mixed_text import mixed_batches

        # Students that learn alone read the same windows of words as those beside a teacher.
        return mixed_batches(parts) if parts.stage.role == STUDENT else None

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.projections == "dual":
            yield from self.unused({"epsilon"}, "method.projections dual compares nothing")
        if self.teacher_learning_rate and config.train.learning_rate == 0:
            yield (
                f"method.teacher_learning_rate: {self.teacher_learning_rate:g} follows the "
                "schedule of train.learning_rate, which is 0; raise train.learning_rate"
            )
        if config.task.type != "mlm":
            yield (
                f"task.type: mixed_vocabulary learns masked tokens of text and needs mlm (got "
                f"{config.task.type}); fine-tune the student on the task afterwards"
            )
        if config.task.streaming:
            yield (
                "task.streaming: the student's vocabulary is trained on the training text before "
                "training, which a stream does not allow; remove the key"
            )
        if config.objective is not None:
            yield (
                "objective: mixed_vocabulary has losses of its own; remove the section, "
                "and see method.projections and method.epsilon"
            )
        yield from self._of_student(config.student.model)

    def _of_student(self, model: Any) -> Iterator[str]:
        shape = getattr(model, "config", None)
        if shape is None:
            yield (
                f'student.model: "{model}" has the embeddings of another vocabulary, and the '
                "student of mixed_vocabulary starts from random weights with a vocabulary of its "
                "own; give its shape as student.model: {config: {model_type: bert, …}}"
            )
        elif shape.get("vocab_size", self.student_vocabulary) != self.student_vocabulary:
            yield (
                f"student.model.config.vocab_size: {shape['vocab_size']}, and "
                f"method.student_vocabulary is {self.student_vocabulary}; remove the key"
            )


def run(config: MixedVocabularyConfig, lab: Lab) -> StageResult:
    """Train student and teacher together (section 4, L_final)."""
    teacher, projections = lab.teacher(config.teacher), ()
    if config.projections != "dual":
        term = ParameterProjection(direction=config.projections, epsilon=config.epsilon)
        projections = (term,)
    # The projections are computed once, in the student's pass.
    without = {term.loss: 0.0 for term in projections} or None
    rate, of_teacher = lab.config.train.learning_rate, config.teacher_learning_rate
    factor = 1.0 if of_teacher is None or not rate else of_teacher / rate
    stage = Stage(
        name=STUDENT,
        learners={STUDENT: 1.0, teacher: factor},
        objective=(*lab.hard_terms(), *projections),
        strategy=Constant((Pass(), Pass(learner=teacher, weights=without))),
    )
    return lab.train(stage)


def patient_kd(config: MixedVocabularyConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `patient_kd` (Sun et al. 2019) with the same student.

    The frozen teacher reads the same words with its own vocabulary, and the first positions of all
    mapped layers are compared.
    """
    del student
    teacher = lab.teacher(config.teacher)
    patient = HiddenCosine(loss="hidden_cosine", positions="first", weight=PATIENT_KD_WEIGHT)
    return Stage(
        name=PATIENT_KD,
        meaning="the same student, taught by the hidden states of the frozen teacher (Patient KD)",
        teachers=(teacher,),
        objective=(*lab.hard_terms(), patient),
        strategy=Constant((Pass(teacher=teacher),)),
    )


BASELINES = {PATIENT_KD: patient_kd}
