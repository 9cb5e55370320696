"""The methods: one file each, with a frozen config and `run(config, lab)`.

A method may have `BASELINES`: by name, what builds the stage of a model of the student's shape that
is made another way, `build(config, lab, student)`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megakd.methods import (
    direct,
    finetune,
    knowledge_selection,
    maxidisc,
    mean_of_teachers,
    minidisc,
    mt_bert,
    single,
    skdbert,
    takd,
)
from megakd.methods.direct import DirectConfig
from megakd.methods.finetune import FinetuneConfig
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.maxidisc import MaxiDiscConfig
from megakd.methods.mean_of_teachers import MeanOfTeachersConfig
from megakd.methods.minidisc import MiniDiscConfig
from megakd.methods.mt_bert import MtBertConfig
from megakd.methods.single import SingleConfig
from megakd.methods.skdbert import SkdbertConfig
from megakd.methods.takd import TakdConfig

MethodConfig = Annotated[
    FinetuneConfig
    | SingleConfig
    | MiniDiscConfig
    | MaxiDiscConfig
    | DirectConfig
    | SkdbertConfig
    | MeanOfTeachersConfig
    | MtBertConfig
    | TakdConfig
    | KnowledgeSelectionConfig,
    Field(discriminator="name"),
]
METHODS = {
    "finetune": finetune,
    "single": single,
    "minidisc": minidisc,
    "maxidisc": maxidisc,
    "direct": direct,
    "skdbert": skdbert,
    "mean_of_teachers": mean_of_teachers,
    "mt_bert": mt_bert,
    "takd": takd,
    "knowledge_selection": knowledge_selection,
}


def baselines_of(method: str) -> tuple[str, ...]:
    """Return the baselines that a run of a method may list; `alone` goes with all of them."""
    return ("alone", *getattr(METHODS[method], "BASELINES", {}))
