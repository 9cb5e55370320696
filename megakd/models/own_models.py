"""The models of `megakd.models.modeling`, with their registration in transformers."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from megakd.errors import ModelError
from megakd.models.architectures import NARROW
from megakd.models.modeling import modeling_cut
from megakd.models.modeling.modeling_t5 import (
    EncT5ForSequenceClassification,
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


# What transformers raises for a config with a wrong value.
CONFIG_ERRORS = (StrictDataclassError, OSError, ValueError, TypeError, AttributeError, KeyError)
AUTO_CLASSES = {
    "LMHeadModel": "AutoModelForCausalLM",  # ends in "Model" too
    "Model": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
}


def _own_models() -> dict[str, OwnModel]:
    models: dict[Any, dict[str, type[PreTrainedModel]]] = {}  # by class of config
    for cls in (T5EncoderForSequenceClassification, EncT5ForSequenceClassification):
        auto = next(auto for ending, auto in AUTO_CLASSES.items() if cls.__name__.endswith(ending))
        models.setdefault(cls.config_class, {})[auto] = cls
    return {config.model_type: OwnModel(config, classes) for config, classes in models.items()}


OWN_MODELS: Mapping[str, OwnModel] = _own_models()
"""By model type."""
CUT_FILE = Path(modeling_cut.__file__)
"""The file that must be beside the weights of a cut model."""


def current_files(names: Iterable[str]) -> dict[str, str]:
    """Return this version's content of the modelling files among the files of a folder."""
    files = {file.name: file for file in (CUT_FILE, *(one.file for one in OWN_MODELS.values()))}
    return {name: files[name].read_text("utf-8") for name in files.keys() & names}


@functools.cache
def register_own_models() -> None:
    """Register the models with transformers' auto classes; only the first call has an effect."""
    for model_type, model in OWN_MODELS.items():
        AutoConfig.register(model_type, model.config)
        for auto, cls in model.models.items():
            getattr(transformers, auto).register(model.config, cls)


def config_in(folder: Path, **options: Any) -> PretrainedConfig:
    """Return the config of a model's folder; that of a narrow model is its stock config.

    Args:
        options: of `AutoConfig.from_pretrained`.
    """
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if NARROW not in keys:
        return AutoConfig.from_pretrained(folder, **options)
    stock = keys["model_type"].removeprefix(f"{NARROW}_")
    if "alone" not in keys[NARROW]:
        raise ModelError(
            f"{folder} holds a cut model of an earlier version of megakd, whose config does not "
            "list its units; open it with that version, or cut the model again"
        )
    stock_class = CONFIG_MAPPING[stock]
    config = modeling_cut.narrow_class(stock_class).from_dict({**keys, "model_type": stock})
    config.__class__ = stock_class  # whose rules may refuse the width
    return config


def own_class(name: str) -> type[PreTrainedModel] | None:
    """Return megakd's model class of this name, or None."""
    classes = (cls for model in OWN_MODELS.values() for cls in model.models.values())
    narrow = getattr(modeling_cut, name, None) if name.startswith("Narrow") else None
    return next((cls for cls in classes if cls.__name__ == name), narrow)


def class_of(config: PretrainedConfig, where: str) -> type[PreTrainedModel]:
    """Return megakd's or transformers' class of the architecture that a config names.

    `where` names the config's file in messages.
    """
    name = (config.architectures or ["none"])[0]
    model_class = own_class(name) or getattr(transformers, name, None)
    is_class = isinstance(model_class, type)
    if not is_class or not issubclass(model_class, transformers.PreTrainedModel):
        raise ModelError(
            f"{where} names the architecture {name!r}, which neither megakd nor transformers "
            f"{transformers.__version__} has"
        )
    return model_class
