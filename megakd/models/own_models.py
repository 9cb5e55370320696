"""The models of `megakd.models.modeling`, with their registration in transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSequenceClassification

from megakd.errors import ModelError
from megakd.models.architectures import NARROW
from megakd.models.modeling import modeling_cut, modeling_t5

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What transformers raises for a config with a wrong value.
CONFIG_ERRORS = (StrictDataclassError, OSError, ValueError, TypeError, AttributeError, KeyError)
OWN_MODELS: Mapping[str, type[PreTrainedModel]] = {
    "t5_encoder": modeling_t5.T5EncoderForSequenceClassification,
    "enct5": modeling_t5.EncT5ForSequenceClassification,
}
"""By model type; their file must be beside the weights to load a model without megakd."""
T5_FILE, CUT_FILE = Path(modeling_t5.__file__), Path(modeling_cut.__file__)
"""The files that must be beside the weights of these models, and of a cut model."""


def current_files(names: Iterable[str]) -> dict[str, str]:
    """Return this version's content of the modelling files among the files of a folder."""
    return {f.name: f.read_text("utf-8") for f in (T5_FILE, CUT_FILE) if f.name in {*names}}


@functools.cache
def register_own_models() -> None:
    """Register the models with transformers' auto classes; only the first call has an effect."""
    for model_type, cls in OWN_MODELS.items():
        AutoConfig.register(model_type, cls.config_class)
        AutoModelForSequenceClassification.register(cls.config_class, cls)


def config_in(folder: Path, **options: Any) -> PretrainedConfig:
    """Return the config of a model's folder; that of a narrow model is its stock config.

    Args:
        options: of `AutoConfig.from_pretrained`.
    """
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if NARROW not in keys:
        return AutoConfig.from_pretrained(folder, **options)
    stock = keys["model_type"].removeprefix(f"{NARROW}_")
    if "stock" not in keys[NARROW]:
        raise ModelError(
            f"{folder} holds a cut model of an earlier version of megakd, whose config does not "
            "list its units; open it with that version, or cut the model again"
        )
    stock_class = CONFIG_MAPPING[stock]
    config = modeling_cut.narrow_class(stock_class).from_dict({**keys, "model_type": stock})
    config.__class__ = stock_class  # whose rules may refuse the width
    return config


def class_of(config: PretrainedConfig, where: str) -> type[PreTrainedModel]:
    """Return megakd's or transformers' class of the architecture that a config names.

    `where` names the config's file in messages.
    """
    name = (config.architectures or ["none"])[0]
    for home in (modeling_t5, modeling_cut, transformers):
        model_class = getattr(home, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    raise ModelError(
        f"{where} names the architecture {name!r}, which neither megakd nor transformers "
        f"{transformers.__version__} has"
    )
