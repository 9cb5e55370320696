"""The models of `megakd.models.modeling`, with their registration in transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from transformers import AutoConfig

from megakd.models.modeling import modeling_cut
from megakd.models.modeling.modeling_t5 import (
    EncT5Config,
    EncT5ForSequenceClassification,
    T5EncoderConfig,
    T5EncoderForSequenceClassification,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class OwnModel(NamedTuple):
    """One model type of megakd.

    config: the config class; its file also defines the models.
    models: the model class of each auto class of transformers.
    """

    config: type[PretrainedConfig]
    models: Mapping[str, type[PreTrainedModel]]

    @property
    def file(self) -> Path:
        """The file that must be beside the weights to load the model without megakd."""
        return Path(inspect.getfile(self.config))

    @property
    def auto_map(self) -> dict[str, str]:
        """The entry of config.json with which transformers finds the classes in the file."""
        classes = {"AutoConfig": self.config, **self.models}
        return {auto: f"{self.file.stem}.{cls.__name__}" for auto, cls in classes.items()}


AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
CUT_FAMILIES = (
    *("Bert", "Roberta", "DistilBert", "Electra"),
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi", "Granite", "GPT2"),
)


def _cut(family: str) -> OwnModel:
    models = {
        auto: getattr(modeling_cut, f"Cut{family}{ending}")
        for ending, auto in AUTO_CLASSES.items()
        if hasattr(modeling_cut, f"Cut{family}{ending}")
    }
    return OwnModel(getattr(modeling_cut, f"Cut{family}Config"), models)


OWN_MODELS: Mapping[str, OwnModel] = {
    model.config.model_type: model
    for model in (
        *map(_cut, CUT_FAMILIES),
        OwnModel(
            modeling_cut.CutGemma3TextConfig,
            {
                "AutoModel": modeling_cut.CutGemma3TextModel,
                "AutoModelForCausalLM": modeling_cut.CutGemma3ForCausalLM,
            },
        ),
        OwnModel(
            T5EncoderConfig,
            {"AutoModelForSequenceClassification": T5EncoderForSequenceClassification},
        ),
        OwnModel(
            EncT5Config, {"AutoModelForSequenceClassification": EncT5ForSequenceClassification}
        ),
    )
}


def current_files(names: Iterable[str]) -> dict[str, str]:
    """Return this version's content of the modelling files among the files of a folder."""
    files = {model.file.name: model.file for model in OWN_MODELS.values()}
    return {name: files[name].read_text("utf-8") for name in files.keys() & names}


@functools.cache
def register_own_models() -> None:
    """Register the models with transformers' auto classes; only the first call has an effect."""
    for model_type, model in OWN_MODELS.items():
        AutoConfig.register(model_type, model.config)
        for auto, cls in model.models.items():
            getattr(transformers, auto).register(model.config, cls)


def own_class(name: str) -> type[PreTrainedModel] | None:
    """Return megakd's model class of this name, or None."""
    classes = (cls for model in OWN_MODELS.values() for cls in model.models.values())
    return next((cls for cls in classes if cls.__name__ == name), None)


def class_of(config: PretrainedConfig) -> tuple[str, Any]:
    """Return the name of a config's architecture, and megakd's or transformers' class, or None."""
    name = (config.architectures or ["none"])[0]
    return name, own_class(name) or getattr(transformers, name, None)
