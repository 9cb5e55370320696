"""Runs on conversations: two tiny Llamas in ChatML, and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lab_scene
import torch
from chat_tokenizers import asked, chat_tokenizer, template_of
from tiny_runs import write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.run import RunConfig
from megakd.config.sections import StudentConfig
from megakd.config.task import TaskConfig

END, OTHER = "<|im_end|>", "<|endoftext|>"


def model(
    folder: Path,
    *,
    end: str = END,
    ends: list[str] | None = None,
    family: str = "chatml",
    rows: int = 340,
) -> str:
    """A Llama whose tokenizer ends texts with `end`, and whose generation ends with `ends`."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.eos_token = end
    tokenizer.chat_template = template_of(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": rows}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(ends or [end])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(folder)


def config_of(folder: Path, **task: Any) -> RunConfig:
    rows = [{"messages": asked(f"Question {n}", "Answer")} for n in range(30)]
    path = write_jsonl(folder / "rows.jsonl", rows)
    section = {"type": "causal_lm", "dataset": str(path), "max_length": 64, **task}
    student = StudentConfig(model=str(folder / "student"))
    return lab_scene.config_of(folder, task=TaskConfig(**section), student=student)
