"""Rows packed by a token budget are longer than the texts that a model has positions for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megakd.contract.batch import IGNORE
from megakd.data.collation import Collator
from megakd.data.step_layout import packed_row
from megakd.models.knowledge import Needs, read_knowledge

LENGTHS = (30, 7, 24, 1, 11, 32)
POSITIONS = 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi", "gpt_oss"])
def test_no_text_of_a_packed_row_sees_another_text(tiny, family):
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    folder = tiny.save(family, **{positions: POSITIONS})
    model = tiny.load(folder, tiny.task("causal_lm", max_length=POSITIONS)).eval()
    task = tiny.task("causal_lm", max_length=POSITIONS)
    collate = Collator(SimpleNamespace(pad_token_id=0), task)
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 300, size=length).tolist() for length in LENGTHS]
    rows = [{"input_ids": ids, "labels": [*ids[1:], IGNORE]} for ids in texts]

    def hidden(batch):
        with torch.no_grad():
            result = read_knowledge(model, batch, Needs()).hidden
        assert result is not None
        return result[batch.valid]

    packed = packed_row(collate(rows), most=128)
    alone = torch.cat([hidden(collate([row])) for row in rows])

    assert packed.valid.shape == (1, 112)
    torch.testing.assert_close(hidden(packed), alone, rtol=1e-4, atol=1e-4)
