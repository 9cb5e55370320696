"""The methods: one file each, with a frozen config and `run(config, lab)`.

A method may have `BASELINES`: by name, what builds the stage of a model of the student's shape that
is made another way, `build(config, lab, student)`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from megakd.contract.plugins import METHODS, OURS, THEIRS, FromPackage
from megakd.methods.direct import DirectConfig
from megakd.methods.finetune import FinetuneConfig
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.maxidisc import MaxiDiscConfig
from megakd.methods.mean_of_teachers import MeanOfTeachersConfig
from megakd.methods.minidisc import MiniDiscConfig
from megakd.methods.mt_bert import MtBertConfig
from megakd.methods.plugin import PluginMethod, wrong_method
from megakd.methods.single import SingleConfig
from megakd.methods.skdbert import SkdbertConfig
from megakd.methods.takd import TakdConfig

if TYPE_CHECKING:
    from megakd.contract.lab import Lab
    from megakd.contract.stage import StageResult

OwnMethod = Annotated[
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
PLUGIN_METHOD = FromPackage(METHODS, "name", OwnMethod, wrong_method)
MethodConfig = Annotated[
    Annotated[OwnMethod, Tag(OURS)] | Annotated[PluginMethod, PLUGIN_METHOD, Tag(THEIRS)],
    Discriminator(PLUGIN_METHOD.branch),
]


def run_method(config: MethodConfig, lab: Lab) -> StageResult:
    """Run a method in a lab: call `run` of the file that holds the method's options."""
    return file_of(config).run(config, lab)


def file_of(config: MethodConfig) -> Any:
    """Return the module that holds a method's options, its `run` and its `BASELINES`."""
    return sys.modules[type(config).__module__]


def baselines_of(config: MethodConfig) -> tuple[str, ...]:
    """Return the baselines that a run of a method may list; `alone` goes with all of them."""
    return ("alone", *getattr(file_of(config), "BASELINES", {}))
