"""What decides whether a teacher has read the same rows."""

from __future__ import annotations

import pytest
from datasets import Dataset

from megakd.data import encoding


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": [[1, 2], [3]]},
        {"input_ids": [[1], [2, 4]]},
        {"input_ids": [[3], [1, 2]]},
        {"input_ids": [[1, 2], [3], []]},
        {"token_type_ids": [[0], [1, 1]]},
    ],
    ids=["boundary", "token", "order", "count", "segment"],
)
def test_whatever_a_model_reads_is_in_the_key_of_the_tokens_and_labels_are_not(changed):
    columns = {"input_ids": [[1], [2, 3]], "token_type_ids": [[0], [0, 1]]}
    key = encoding.tokens_key(Dataset.from_dict(columns | {"label": [0, 1]}))
    other = columns | changed
    if len(other["input_ids"]) > 2:
        other["token_type_ids"] = [*other["token_type_ids"], []]

    assert encoding.tokens_key(Dataset.from_dict(columns | {"label": [-100, 1]})) == key
    assert encoding.tokens_key(Dataset.from_dict(other)) != key
