"""Data that cannot be used is refused with the file, the place and the value."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.errors import ConfigError, DataError

GOOD = "text,label\na,0\nb,1\nc,0\n"
LANGUAGE = {"type": "causal_lm"}
SCORES = {"type": "regression"}


def labels(*values: object) -> str:
    return "text,label\n" + "".join(f"text {n},{value}\n" for n, value in enumerate(values))


# The files (one file is the data set, several are a folder), the message, and keys of the task.
CASES: list[tuple[Any, ...]] = [
    # Names of files
    ({"train.csv": GOOD, "train.jsonl": ""}, r"train\.csv and train\.jsonl are names of the same"),
    ({"train-0-of-1-a.csv": GOOD, "train-0-of-1-b.csv": GOOD}, r"1-b\.csv is there with another h"),
    ({"train-0-of-1.csv": GOOD, "train.csv": GOOD}, r"train-\*-of-1\.csv and train\.csv are names"),
    ({"train-0-of-1.csv": GOOD, "train-0-of-2.csv": GOOD}, r"train-\*-of-1\.csv and train-\*-of-2"),
    ({"data.csv": GOOD, "more.csv": GOOD}, r"train\.\* does not exist .* the folder holds: data"),
    ({"x.xlsx": "PK"}, r"x\.xlsx has an unsupported ending; supported: \.csv"),
    *(
        ({}, rf"{name} does not exist", {"dataset": given})
        for name, given in ((r"nope\.csv", "nope.csv"), ("nope", "./nope"), ("a/b/c", "a/b/c"))
    ),
    # Rows
    ({"x.csv": ""}, r"x\.csv has no rows"),
    ({"x.csv": "text,label\n"}, r"x\.csv has no rows"),
    ({"x.tsv": ""}, r"x\.tsv has no rows", LANGUAGE),
    ({"x.jsonl": ""}, r"x\.jsonl has no rows", LANGUAGE),
    ({"x.txt": ""}, r"x\.txt has no rows", LANGUAGE),
    *(
        (
            {f"x.{kind}": content},
            rf"x\.{kind}, line 3: text is not UTF-8 \(byte 0xe9 at position \d+\)",
            LANGUAGE,
        )
        for kind, content in (
            ("csv", "text,label\nok,1\ncaf\udce9,0"),
            ("jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "caf\udce9"}'),
            ("txt", "one\ntwo\ncaf\udce9"),
        )
    ),
    ({"x.csv": 'text,label\n"",0\n" ",1\n'}, "all 2 rows have an empty text"),
    ({"x.csv": "text;label\na;1\n"}, r"x\.csv, line 1: no comma, but ';' in 'text;label'"),
    ({"x.csv": "text,label\na,1,2\n"}, r"x\.csv, line 2: 3 fields, but there are 2 columns"),
    ({"x.csv": 'text,label\n"a,1\n'}, r"x\.csv, line 2: not valid CSV: unexpected end of data"),
    ({"x.tsv": "text\tlabel\na\n"}, r"x\.tsv, line 2: 1 fields, but there are 2 columns"),
    ({"x.jsonl": '{"text": "a"}\n{"text"\n'}, r"x\.jsonl, line 2 is not JSON", LANGUAGE),
    ({"x.jsonl": "7\n"}, r"x\.jsonl, line 1 is not a JSON object", LANGUAGE),
    ({"x.jsonl": '{"text": 7}\n'}, r"line 1: column 'text' is not text: 7", LANGUAGE),
    ({"x.jsonl": '{"text": "a"}\n{"b": 1}\n'}, r"line 2: column 'text' is missing", LANGUAGE),
    (
        {"x.jsonl": '{"text": "a \\ud800"}\n{"text": "b"}\n'},
        r"x\.jsonl, line 1: column 'text' is not UTF-8",
        LANGUAGE,
    ),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1, "label": 0}\n'},
        r"x\.jsonl, line 2: the key 'label' occurs more than once",
    ),
    (
        {"x.json": '[["a", 0], {"text": "b", "text": "c", "label": 1}]'},
        "row 2: the key 'text' occurs",
    ),
    ({"x.json": '{"train": [], "train": [["a", 0]]}'}, r"x\.json: the key 'train'"),
    (
        {"x.json": '{"train": [["a", 0], ["b", 1]], "val": [["c", 0]], "dev": [["d", 1]]}'},
        r"x\.json: 'val' and 'dev' are names of the same split",
    ),
    *(
        ({f"x.{kind}": content}, rf"{place}: the key 'role' occurs more than once", LANGUAGE)
        for kind, content, place in (
            ("jsonl", '{"text": "a", "from": [{"role": 1, "role": 2}]}', r"x\.jsonl, line 1"),
            ("json", '[{"text": "a", "from": {"at": {"role": 1, "role": 2}}}]', "row 1"),
        )
    ),
    (
        {"x.json": '{"train": [["a", 0], ["b", 1]], "dev": {"text": "c"}}'},
        r"x\.json \(dev\) is not a list of rows \(got \{'text': 'c'\}\)",
    ),
    ({"x.json": "{}"}, r"x\.json is neither a JSON list of rows nor", LANGUAGE),
    ({"x.json": '{"val": [["a", 0]]}'}, r"x\.json holds validation and no list named 'train'"),
    ({"x.json": "[[1, 2, 3]]"}, r"row 1 must be a text, an object or \[text, label\]", LANGUAGE),
    ({"x.parquet": "PAR1"}, r"x\.parquet is not a readable parquet file", LANGUAGE),
    # Columns
    ({"x.csv": "text,text\na,b\n"}, r"x\.csv: column 'text' occurs more than once"),
    ({"x.csv": "body,label\na,0\n"}, r"column 'text' does not exist; the columns are body, label;"),
    ({"x.jsonl": '{"question": "a"}'}, r"are question; .*prompts .*task\.prompt_column", LANGUAGE),
    ({"x.csv": "text,topic\na,0\n"}, r"column 'label' does not exist; .* are text, topic; set tas"),
    ({"train.csv": GOOD, "dev.csv": "text\na\n"}, r"dev\.csv: column 'label' .* does not exist"),
    # Labels
    *(
        ({"x.csv": labels("0.5", f'"{wrong}"')}, rf"line 3: '{wrong}' .* is not a finite", SCORES)
        for wrong in ("good", "inf", "1,5", "1_000", "1e39", "-1e300")
    ),
    ({"x.csv": labels(0, 1, 99)}, r"x\.csv, line 4: label 99 is outside 0\.\.2"),
    ({"x.csv": labels(1, 2, 3)}, r"x\.csv, line 4: label 3 is outside 0\.\.2"),
    ({"x.csv": labels(0, -1, 1)}, r"x\.csv, line 3: label -1 is outside 0\.\.2"),
    ({"x.csv": labels(0, "cat", 1)}, r"the labels mix numbers and words: '0' \(line 2\) and 'cat'"),
    ({"x.csv": labels(1, 1, 1)}, r"all labels in column 'label' are '1'; classification needs at"),
    ({"x.csv": labels("", "", "")}, r"column 'label' has no label in any row"),
    (
        {"x.jsonl": '{"text": "a", "label": "\\ud800x"}\n{"text": "b", "label": "y"}\n'},
        r"x\.jsonl, line 1: column 'label' is not UTF-8",
    ),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": [1]}\n'},
        r"line 2: label \[1\] in column 'label' is not a class",
    ),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 0.5}\n'},
        r"line 2: label 0\.5 .* is not a class; .* task\.type: regression",
    ),
    ({"train.csv": GOOD, "dev.csv": labels(0, 7)}, r"dev\.csv, line 3: label 7 is outside 0\.\.1"),
    (
        {"train.csv": labels("negative", "positive"), "dev.csv": labels("postive")},
        r"dev\.csv, line 2: label 'postive' is not one of the 2 .* did you mean 'positive'\?",
    ),
    ({"train.csv": GOOD, "dev.csv": "text,label\na,\n"}, r"the validation split of .* has no labe"),
    # Keys
    ({"x.csv": GOOD}, r"column 'topic' \(task\.label_column\) does not", {"label_column": "topic"}),
    (
        {"train.csv": GOOD, "dev.csv": GOOD},
        r"task\.labelled_examples: 4, .* has 3 labelled rows",
        {"labelled_examples": 4},
    ),
    ({"x.csv": GOOD}, r"task\.dataset_config: 'en' names a configuratio", {"dataset_config": "en"}),
    # Data sets of the Hub; tests/conftest.py sets HF_HUB_OFFLINE
    (
        {},
        r"the Hub cannot be reached to load the data set someone/somedata \(en\), .* pydocs",
        {"dataset": "someone/somedata", "dataset_config": "en"},
    ),
    ({}, r"task\.dataset pydocs supports classificat", {"dataset": "pydocs", "type": "regression"}),
    ({}, r"the data set what is this\?", {"dataset": "what is this?"}),
]


@pytest.mark.parametrize(
    ("files", "message", "keys"),
    [(*case, {})[:3] for case in CASES],
    ids=[c[1][:40] for c in CASES],
)
def test_data_that_cannot_be_used_is_refused_with_the_reason(load, tmp_path, files, message, keys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        # A byte that is no UTF-8 stands in the text as "\udc" and its digits.
        (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    given = folder / next(iter(files)) if len(files) == 1 else folder

    with pytest.raises((ConfigError, DataError), match=message):
        load(**{"dataset": given, **keys})
