"""The methods: one file each, with a frozen config and `run(config, lab)`."""

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
