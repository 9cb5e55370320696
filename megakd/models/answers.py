"""The answers of a finished model to texts: labels, numbers, filled masks or continuations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megakd.contract.tasks import TaskType
from megakd.data.token_tables import document_ends
from megakd.data.tokenizers import from_folder, has_tokenizer_files
from megakd.errors import DataError, ModelError
from megakd.models.architectures import context_length, has_token_types
from megakd.models.generation import check_prompt_lengths, without_settings
from megakd.models.loading import config_of_folder, load_finished
from megakd.models.onnx import MODEL, OnnxModel, check_packages

ROWS = 32
"""Texts of a batch."""
NO_LIMIT = 1_000_000
"""Tokens that no text has."""
SHOWN = 5
"""Tokens that a masked position may be filled with."""
Answer = Mapping[str, Any]


class TorchModel:
    """A model of transformers on the CPU in fp32."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        loaded = load_finished(folder, "MODEL", config=config, dtype=torch.float32)
        self.model: PreTrainedModel = loaded.eval()
        self.inputs = tuple(signature(self.model.forward).parameters)

    @torch.inference_mode()
    def logits(self, inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Return the logits [B, C] or [B, T, V]."""
        return self.model(**inputs).logits.numpy()


def answers_of(folder: Path, texts: Sequence[str], *, new_tokens: int = 64) -> Iterator[Answer]:
    """Yield one answer per text.

    A classifier gives `label`, `probability` and `probabilities`, a regression model `value`, a
    masked language model the `tokens` for each mask of its tokenizer, and a decoder its greedy
    `text`; a chat template, if there is one, makes the text a user's turn.

    Args:
        folder: a model folder of megakd or transformers, or one with an ONNX graph.
        texts: a tab parts the two texts of a pair.
        new_tokens: most tokens of a decoder's text.

    Raises:
        ModelError: the folder is no model folder, has no tokenizer, or its model is no model of
            these tasks.
        DataError: a decoder's prompt has no tokens, or leaves no room for the new ones; a masked
            language model's text has no mask.
    """
    config = config_of_folder(folder, "MODEL")
    task = next((n for n in _TASKS if n in (config.architectures or [""])[0]), None)
    # The graph stands in for weights that are not there.
    is_graph = (folder / MODEL).is_file() and not any(folder.glob("*.safetensors"))
    if task is None or (task in _GENERATES and is_graph):
        raise ModelError(
            f"{folder}: {'a graph' if task else 'the model'} of {config.architectures} gives no "
            "answers to texts; give a classifier, a masked language model or a decoder's weights"
        )
    if not has_tokenizer_files(folder):
        raise ModelError(f"{folder} has no tokenizer; copy the tokenizer's files there")
    if is_graph:
        check_packages(f"MODEL: {folder / MODEL}", ("onnxruntime",))
    tokenizer = from_folder(folder, _TASKS[task])
    _check_answers(folder, config, task, tokenizer)
    if task in _GENERATES:
        yield from _continued(TorchModel(folder, config).model, tokenizer, texts, new_tokens)
        return
    model = OnnxModel(folder / MODEL) if is_graph else TorchModel(folder, config)
    for start in range(0, len(texts), ROWS):
        encoded = _encoded(tokenizer, texts[start : start + ROWS], config)
        if "token_type_ids" in encoded and not has_token_types(config):
            encoded["token_type_ids"].zero_()
        logits = model.logits({name: encoded[name] for name in encoded if name in model.inputs})
        is_masked = task == "ForMaskedLM"
        for row, ids in zip(logits, encoded["input_ids"], strict=True):
            yield _filled(row, ids, tokenizer) if is_masked else _classified(row, config.id2label)


_GENERATES = ("ForCausalLM", "LMHeadModel")
_TASKS: Mapping[str, TaskType] = {
    "ForSequenceClassification": "classification",
    "ForMaskedLM": "mlm",
    **dict.fromkeys(_GENERATES, "causal_lm"),
}


def _check_answers(folder: Path, config: PretrainedConfig, task: str, tokenizer: Any) -> None:
    if config.problem_type == "multi_label_classification":
        raise ModelError(
            f"{folder}: the model decides on each label alone, and predict names one of all labels"
        )
    if task not in _GENERATES and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no pad token, which texts of several lengths need; set "
            "pad_token in its tokenizer_config.json, and pad_token_id in config.json"
        )
    if task == "ForMaskedLM" and tokenizer.mask_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no mask token to fill; copy the model's own tokenizer"
        )


def _encoded(
    tokenizer: Any, texts: Sequence[str], config: PretrainedConfig
) -> Mapping[str, Tensor]:
    pairs = [tuple(text.split("\t", 1)) if "\t" in text else text for text in texts]
    # A tokenizer without a length states 1e30.
    limits = [context_length(config) or NO_LIMIT, tokenizer.model_max_length, NO_LIMIT]
    return tokenizer(
        pairs, padding=True, truncation=True, max_length=min(limits), return_tensors="pt"
    )


def _classified(logits: NDArray[np.float32], names: Any) -> Answer:
    if len(logits) == 1:
        return {"value": float(logits[0])}
    shares = torch.from_numpy(logits).softmax(-1).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    probabilities = {names[number]: share for number, share in enumerate(shares)}
    return {"label": names[best], "probability": shares[best], "probabilities": probabilities}


def _filled(logits: NDArray[np.float32], ids: Tensor, tokenizer: Any) -> Answer:
    places = (ids == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not places:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        raise DataError(
            f"the text {text!r:.80} has no {tokenizer.mask_token}, which the model would replace; "
            f"write {tokenizer.mask_token} where a token is to be filled in"
        )
    best = [logits[place].argsort()[::-1][:SHOWN].tolist() for place in places]
    return {"tokens": [[tokenizer.decode([token]).strip() for token in one] for one in best]}


def _continued(
    model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int
) -> Iterator[Answer]:
    prompts = [_prompt(tokenizer, text) for text in texts]
    check_prompt_lengths([*map(len, prompts)], new_tokens, context_length(model.config))
    settings = model.generation_config
    ends = {"eos_token_id": settings.eos_token_id, "pad_token_id": settings.pad_token_id}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode(), without_settings(model):
            tokens = model.generate(**given, max_new_tokens=new_tokens, do_sample=False, **ends)
        yield {"text": tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)}


def _prompt(tokenizer: Any, text: str) -> list[int]:
    prefix: list[int] = []
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        # Without what ends a document, after which a model would begin another one.
        prefix, _ = document_ends(tokenizer)
    return [*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]
