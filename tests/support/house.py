"""How many files know each feature, and other measures of the package that may only fall.

`python tests/support/house.py` prints them; with `--run` also what the plain run of a tiny
classifier enters. The identifiers of a feature are listed here: a rename is followed here too.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "megakd"
MOST_IMPORTS = 20
"""Files that import more files of the package than these are hubs."""

FEATURES: Mapping[str, str] = {
    "views": r"views?|viewing|[eE]lastic|View|weights_in_view",
    "adapters": r"lora|lora_of|LoraConfig|adapters?|base_teachers|STUDENT_BASE|base_model|bases"
    r"|adapter_\w+|\w+_adapters?|learns_adapters",
    "generated texts": r"\w*[rR]ollout\w*|SOURCE_UNITS|source_of|on_source|source_counters|is_of"
    r"|works_ahead",
    "several learners": r"learners|beside|by_role|unit_of|RATE|rates|learner",
    "mixed vocabulary": r"second_vocabulary|Second[A-Z]\w*|own_vocabulary|VocabularyPair"
    r"|OtherReading|second_targets|method_rows|student_tokenizer|tokenizer_of|teacher_tokenizer"
    r"|teacher_encoded|\w+_second_vocabulary",
    "several labels": r"multi_label|MULTI_LABEL|LabelForm|label_form|THRESHOLD|threshold"
    r"|SET_METRICS|label_separator",
    "routed rows": r"routes_rows|ROUTE|routes?|teacher_number|divides_rows|teacher_column"
    r"|is_taught|check_row_teachers|rows_of_teachers|numbers_of",
    "streams": r"streaming|\w*[sS]tream(ed)?\w*",
    "servers": r"servers?|\w*Server\w*|served_\w+|serves",
    "windows": r"Window|WindowState|has_next_window|pruned_to|continue_window|averages|AVERAGES"
    r"|TRAINING_STATE|window",
    "soft labels": r"soft_labels|SOFT_LABELS|SoftLabels|SOFT|reads_soft_labels"
    r"|with_soft_labels|soft_text",
    "fewer bits": r"\w*fp8\w*|\w*FP8\w*|\w*quantiz\w*|GGUF|gguf\w*|packed_linears|pack_linears",
    "mixtures": r"mixture|MixtureSource|as_chat|SOURCE|mixture_tables",
    "cached answers": r"CachedTeacher|cache_draws|cache_top_k|fill_cache|open_cache|Draws|TopK"
    r"|missing_rows|write_shard|check_caches",
    "fused layers": r"\w*fused?_layers|FusedLayers|fused_forwards|choice_of|is_fused|fused",
    "kept layers": r"KeptLayers|ranks_layers|layer_scores|with_layers|layers_to_keep|as_student"
    r"|measure_layers",
}
"""By feature: the identifiers and one-word texts by which a file shows that it knows it."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def identifiers(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.keyword(arg=str(name)):
                names.add(name)
            case ast.alias(name=name):
                names.add(name.split(".")[-1])
            case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_ .]{3,90}", text):
                names.update(text.replace(".", " ").split())
            case _:
                pass
    return frozenset(names)


def files_that_name(feature: str) -> list[Path]:
    """Return the files that know a feature."""
    pattern = re.compile(rf"(?:{FEATURES[feature]})\Z")
    return [path for path in sources() if any(map(pattern.match, identifiers(path)))]


def imports() -> Iterator[tuple[Path, Path, bool]]:
    """Yield importer, imported file, and whether the import stands below the top of the file."""
    modules = {
        "megakd." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sources()
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    for path in sources():
        top = {*map(id, tree_of(path).body)}
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megakd")):
                continue
            for alias in node.names:
                target = modules.get(f"{node.module}.{alias.name}") or modules.get(f"{node.module}")
                if target not in {None, path}:
                    yield path, target, id(node) not in top


def measures() -> dict[str, int]:
    """Return every number that has a ceiling and needs no run."""
    imported = defaultdict[Path, set[Path]](set)
    late = set()
    for path, target, is_late in imports():
        imported[path].add(target)
        late |= {(path, target)} if is_late else set()
    files, names = defaultdict[str, set[Path]](set), Counter[str]()
    for path in sources():
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                files[node.name.lstrip("_").lower()].add(path)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Name):
                names["Any"] += node.id == "Any"
            elif isinstance(node, ast.ClassDef):
                methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef))
                names["of"] += [*methods].count("of")
    return {
        **{f"files that name {feature}": len(files_that_name(feature)) for feature in FEATURES},
        f"files that import over {MOST_IMPORTS}": sum(
            len(others) > MOST_IMPORTS for others in imported.values()
        ),
        "late or type-only imports": len(late),
        "names that several files define": sum(len(places) > 1 for places in files.values()),
        "methods called of": names["of"],
        "annotations Any": names["Any"],
    }


def plain_run() -> dict[str, int]:
    """Return what a run of three steps of a tiny classifier enters, traced in this process."""
    import deepspeed  # noqa: F401 - their own calls do not count
    import torch

    torch.set_num_threads(1)
    called, files, first = set[tuple[str, int]](), set[str](), list[tuple[int, int]]()
    last, changes = "", 0

    def note(frame: FrameType, _: str, __: Any) -> None:
        nonlocal last, changes
        code = frame.f_code
        is_function = bool(code.co_flags & 1)  # the bodies of classes are none
        if not (code.co_filename.startswith(str(PACKAGE)) and is_function):
            return
        called.add((code.co_filename, code.co_firstlineno))
        files.add(code.co_filename)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and code.co_filename != last:
            last, changes = code.co_filename, changes + 1
        if code.co_name == "train_step" and not first:
            first.append((len(files), changes))

    with TemporaryDirectory() as folder:
        os.environ["MEGAKD_CACHE"] = f"{folder}/cache"  # a second start reads what is remembered
        words = [("good fine nice", "up"), ("bad sad poor", "down")]
        rows = (f"{words[n % 2][0]} {n},{words[n % 2][1]}\n" for n in range(200))
        Path(folder, "data.csv").write_text("text,label\n" + "".join(rows))
        bert = {
            "model_type": "bert",
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        sys.settrace(note)
        threading.settrace(note)
        import megakd

        megakd.train(
            {
                "output_dir": f"{folder}/out",
                "task": {
                    "type": "classification",
                    "dataset": f"{folder}/data.csv",
                    "max_length": 16,
                },
                "teacher": {
                    "model": {"config": bert},
                    "deepspeed": "teacher_zero0",
                    "finetune": {"max_steps": 2},
                },
                "student": {"model": {"config": bert | {"num_hidden_layers": 1}}},
                "method": {"name": "single"},
                "baselines": [],
                "train": {"max_steps": 3, "per_device_train_batch_size": 4},
                "log": {"report_to": "none"},
                "eval": {"latency": False},
            }
        )
        sys.settrace(None)
        threading.settrace(None)
    lines = 0
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                start = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                is_called = (str(path), start) in called
                lines += is_called * ((node.end_lineno or start) - node.lineno + 1)
    return {
        "plain run: lines of functions": lines,
        "plain run: files": len(files),
        "plain run: files before the first step": first[0][0],
        "plain run: changes of file before the first step": first[0][1],
    }


if __name__ == "__main__":
    for name, value in (measures() | (plain_run() if "--run" in sys.argv else {})).items():
        print(f"{value:>8,}  {name}")  # noqa: T201
