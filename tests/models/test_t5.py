"""T5 for texts: transformers' own encoder and decoder inside, and checkpoints of T5."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5Model,
)

from megakd.errors import ModelError
from megakd.models.structure import parameter_counts

SHAPE = {"d_model": 16, "d_kv": 6, "num_heads": 4, "d_ff": 32, "vocab_size": 300}
NAMES = ("a", "b", "c")


def original(layers=2, kind="relu", **keys):
    """T5's own shape, one decoder layer fewer than an encoder has."""
    keys = {**SHAPE, "num_layers": layers, "num_decoder_layers": 1, **keys}
    return T5Config(**keys, feed_forward_proj=kind)


def mask_of(tiny):
    mask = torch.ones_like(tiny.input_ids)
    mask[1, 7:] = 0
    return mask


def as_in_t5(model):
    """Weights by T5's names."""
    state = model.state_dict()
    state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    return state


def fresh(tiny, model_type, **keys):
    """Random values everywhere."""
    return tiny.load(
        tiny.save(model_type, id2label=dict(enumerate(NAMES)), **keys),
        tiny.task(),
        label_names=NAMES,
    )


@pytest.mark.parametrize(
    ("model_type", "kind", "attention"),
    [("t5_encoder", "relu", "sdpa"), ("enct5", "gated-gelu", "eager")],
)
def test_hidden_states_are_those_of_transformers_own_encoder(tiny, model_type, kind, attention):
    model = fresh(tiny, model_type, feed_forward_proj=kind)
    reference = T5EncoderModel(original(kind=kind)).eval()
    reference.load_state_dict(as_in_t5(model), strict=False)
    for each in (model, reference):
        each.set_attn_implementation(attention)

    inputs = {"input_ids": tiny.input_ids, "attention_mask": mask_of(tiny)}
    ours = model(**inputs, output_hidden_states=True).hidden_states
    theirs = reference(**inputs, output_hidden_states=True).hidden_states

    assert len(ours) == 3
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_enct5_answers_what_t5s_own_decoder_makes_of_the_prompt(tiny, kind):
    model = fresh(tiny, "enct5", feed_forward_proj=kind)
    reference = T5Model(original(kind=kind)).eval()
    reference.load_state_dict(
        {n: t for n, t in as_in_t5(model).items() if "embed_tokens" not in n}, strict=False
    )
    prompt = model.decoder.embed_tokens.weight.expand(2, 1, -1)

    inputs = {"input_ids": tiny.input_ids, "attention_mask": mask_of(tiny)}
    decoded = reference(**inputs, decoder_inputs_embeds=prompt).last_hidden_state[:, 0]

    torch.testing.assert_close(model(**inputs).logits, model.classifier(decoded))


def test_t5_encoder_answers_from_the_mean_over_a_texts_tokens(tiny):
    model, mask = fresh(tiny, "t5_encoder"), mask_of(tiny)

    states = model.encoder(tiny.input_ids, attention_mask=mask).last_hidden_state

    logits = model(tiny.input_ids, mask).logits
    for row, length in ((0, 12), (1, 7)):
        wanted = model.classifier(states[row, :length].mean(0))
        torch.testing.assert_close(logits[row], wanted)
    labels = torch.tensor([2, 0])
    out = model(tiny.input_ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, labels))
    assert len(model(tiny.input_ids, labels=labels, return_dict=False)) == 2


# At the size of real layers, where a deviation can be told from its neighbours.
def test_first_values_are_spread_as_t5s_own(tiny):
    sizes = {"d_model": 64, "d_ff": 192, "num_layers": 1}
    theirs = dict(T5Model(original(1, "gated-gelu", **sizes)).named_parameters())

    model = tiny.load(tiny.scratch("enct5", **sizes), tiny.task(), need_head=False)

    for name, value in model.named_parameters():
        wanted = theirs.get(name.replace("encoder.embed_tokens", "shared"))
        if name == "classifier.weight":
            assert value.std().item() == pytest.approx(64**-0.5, rel=0.3)
        elif name == "decoder.embed_tokens.weight":
            assert 0.7 < value.std() < 1.3
        elif wanted is not None:
            assert value.std().item() == pytest.approx(wanted.std().item(), rel=0.2, abs=1e-6), name


# Checkpoints of T5.


def published(tiny, change=None, **keys):
    """A folder as T5's authors left it."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(original(**keys)).save_pretrained(tiny.folder)
    if change is not None:
        tiny.rewrite(change)
    return tiny.folder


def read(tiny, folder, **keys):
    source = tiny.resolve(folder, tiny.task(), **keys)
    return tiny.load(source, tiny.task(), label_names=NAMES, need_head=False)


@pytest.mark.parametrize(
    ("wanted", "kind"), [(None, "relu"), ("enct5", "gated-gelu"), ("t5_encoder", "gated-gelu")]
)
def test_a_published_t5_is_read_as_the_model_that_is_asked_for(tiny, wanted, kind, caplog):
    folder = published(tiny, kind=kind, num_decoder_layers=3)

    with caplog.at_level(logging.INFO, logger="megakd"):
        model = read(tiny, folder, architecture=wanted)

    assert model.config.model_type == (wanted or "enct5")
    stored = load_file(folder / "model.safetensors")
    new = {
        n for n, value in as_in_t5(model).items() if n not in stored or (value != stored[n]).any()
    }
    prompt = set() if wanted == "t5_encoder" else {"decoder.embed_tokens.weight"}
    assert new == {"classifier.weight", "classifier.bias"} | prompt
    assert "stored weights are not used" in caplog.text
    reference = T5EncoderModel.from_pretrained(folder)
    assert torch.equal(model.encoder(tiny.input_ids)[0], reference(tiny.input_ids)[0])


def test_mt5_is_read_the_same_way(tiny):
    keys = {**SHAPE, "num_layers": 2, "num_decoder_layers": 2}
    MT5ForConditionalGeneration(MT5Config(**keys)).save_pretrained(tiny.folder)
    model = read(tiny, tiny.folder)
    assert model.config.model_type == "enct5"
    assert model.config.is_gated_act


def test_a_file_may_hold_the_embedding_three_times_and_has_to_hold_the_whole_decoder(tiny):
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    folder = published(tiny, lambda t: {**t, **{n: t["shared.weight"].clone() for n in names}})

    model = read(tiny, folder)

    assert model.decoder.embed_tokens.weight.shape == (1, 16)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.encoder.embed_tokens.weight, stored["shared.weight"])
    # What is missing of the decoder is named.
    tiny.rewrite(lambda t: {n: v for n, v in t.items() if "EncDecAttention" not in n})
    with pytest.raises(
        ModelError, match=r"lacks 4 weights of a enct5 model \(decoder\.block\.0\.l"
    ):
        read(tiny, folder)


def test_an_encoder_alone_is_refused_as_enct5_and_read_as_t5_encoder(tiny):
    T5EncoderModel(original()).save_pretrained(tiny.folder)
    with pytest.raises(ModelError, match=r"set teacher\.architecture: t5_encoder"):
        read(tiny, tiny.folder)
    assert read(tiny, tiny.folder, architecture="t5_encoder").config.num_layers == 2
    with pytest.raises(ModelError, match=r"teacher\.architecture: enct5 applies only to a T5"):
        tiny.resolve(tiny.save("bert"), tiny.task(), architecture="enct5")


def test_a_t5_with_the_head_of_transformers_is_refused_with_its_class(tiny):
    T5ForSequenceClassification(original()).save_pretrained(tiny.folder)
    for wanted in (None, "t5_encoder"):
        with pytest.raises(ModelError, match=r"head, T5ForSequenceClassification, which megakd c"):
            read(tiny, tiny.folder, architecture=wanted)


def test_lists_that_do_not_fit_the_layers_are_refused(tiny):
    for key, value in {"head_counts": [1], "neuron_counts": [1], "head_columns": [[1]]}.items():
        with pytest.raises(ModelError, match=rf"{key} must have [34] entries \(got 1\)"):
            tiny.resolve(tiny.scratch("enct5", **{key: value}), tiny.task())


def test_the_weights_of_the_encoder_are_those_that_every_token_meets(tiny):
    """The decoder of a classifier reads one token per text, and is no part of a share of FLOPs."""
    model = fresh(tiny, "enct5")

    counts = parameter_counts(model)

    parts = (model.encoder.block, model.encoder.final_layer_norm)
    weights = [weight for part in parts for weight in part.parameters()]
    assert counts.encoder_parameters == sum(weight.numel() for weight in weights)
    assert counts.parameters == sum(weight.numel() for weight in model.parameters())
