"""Small models of every family, and dense models that stand for a view of them.

Neither way to make those goes through the slices of an elastic model: `masked` sets to zero what
leaves the other units, with all units there; `cut` makes every weight smaller, for good.
"""

from __future__ import annotations

import copy

import tiny_cuts
import torch
from cut_families import FAMILIES as CUT_FAMILIES
from torch import nn
from transformers import CONFIG_MAPPING

from megakd.models.cutting import cut_config
from megakd.models.elastic import weight_axes
from megakd.models.proposed_units import cut_part
from megakd.models.small_copy import new_model
from megakd.models.structure import architecture_of, for_task
from megakd.models.views import Cut, View

FAMILIES = [*CUT_FAMILIES]
LAYERS, HEADS, NEURONS, WIDTH, VOCABULARY = 3, 3, 40, 24, 100
UNEVEN = View((3, 1, 2), (7, 40, 33))
WITHOUT = View((0, 2, 0), (12, 0, 0))
NOTHING = View((0, 0, 0), (0, 0, 0))
EVERYTHING = View((3, 3, 3), (40, 40, 40), WIDTH)
NARROW = View((3, 1, 2), (7, 40, 33), 17)
TOKENS = torch.arange(2, 26).reshape(2, 12)


def family_model(
    family: str, task: str | None = None, *, seed: int = 3, kept: View | None = None, **changes
):
    """Three layers of three units each, every parameter random, in fp64 and eval mode."""
    entry, keys = CUT_FAMILIES[family], dict(tiny_cuts.FAMILIES[family])
    if "num_key_value_heads" not in keys:  # else a key head is shared by two of six query heads
        keys["num_attention_heads"] = HEADS
    keys |= {entry.neurons: NEURONS, "vocab_size": VOCABULARY, "eos_token_id": 2}
    keys |= {"bos_token_id": 0, "pad_token_id": 1}
    config = CONFIG_MAPPING[family](**{**keys, **changes})
    for_task(config, task or entry.tasks[0])
    if kept is not None:
        config = cut_config(config, kept)
    model = new_model(config, task or entry.tasks[0]).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(values * 0.3)
    return model


def view_for(model, view: View | None) -> View | None:
    """The view with as many entries as the model has attentions and feed-forwards."""
    if view is None:
        return None
    units = architecture_of(model.config).units(model.config)
    heads, neurons = (
        tuple(kept[i % LAYERS] for i in range(len(there)))
        for kept, there in ((view.heads, units.heads), (view.neurons, units.neurons))
    )
    return View(heads, neurons, view.width)


def masked(model, view: View):
    """Return the whole model with the outputs of other heads and neurons set to zero."""
    model = copy.deepcopy(model)
    found = architecture_of(model.config).found_units(model.config)
    for kind, counts in (("heads", view.heads), ("neurons", view.neurons)):
        for number, owner, units in found.parts_with(kind):
            _, (per_unit,) = units.parts[f"{units.output}.weight"]
            _mask(model.get_submodule(f"{owner}.{units.output}"), counts[number] * per_unit)
    return model


def _mask(module: nn.Module, kept: int) -> None:
    def zero(module, inputs):
        return (inputs[0] * (torch.arange(inputs[0].shape[-1]) < kept),)

    module.register_forward_pre_hook(zero)
    if kept == 0:  # nothing is heard of it, its bias included
        module.register_forward_hook(lambda _, inputs, output: output * 0)


def cut(model, view: View):
    """A dense model of the prefixes of all weights, none tied; all layers must have heads."""
    axes, model = weight_axes(model), copy.deepcopy(model)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = cut_part(parameter.detach(), axes.get(f"{path}.{name}", ()), Cut(None, view))
            setattr(module, name, nn.Parameter(part.clone()))
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
        if hasattr(module, "embed_scale"):  # Gemma's, the root of the width
            module.embed_scale *= (module.weight.shape[1] / WIDTH) ** 0.5
        if hasattr(module, "nf"):
            module.nf = module.weight.shape[1]
    for module in model.modules():
        if hasattr(module, "split_size"):
            module.split_size = module.c_attn.weight.shape[1] // 3
    return model


def logits_of(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits of texts whose last three tokens are padding."""
    padding = torch.arange(tokens.shape[1]) < tokens.shape[1] - 3
    return model(input_ids=tokens, attention_mask=padding.expand_as(tokens).long()).logits


def loss_of(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """A mean over texts that no logit drops out of."""
    logits = logits_of(model, tokens)
    return (logits * torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)).mean()


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter; zeros if there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def without_dropout(model):
    """In training mode, where gradient checkpointing works, and yet nothing is drawn."""
    for module in model.train().modules():
        for name in ("dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def assert_same(actual: dict, expected: dict, *, tolerance: float = 1e-5) -> None:
    """Every tensor within a part of the largest value of all."""
    assert actual.keys() == expected.keys()
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 0
    for name, value in expected.items():
        difference = float((actual[name] - value).abs().max())
        assert difference <= tolerance * size, f"{name}: {difference} of {size}"
