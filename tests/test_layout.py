"""Rules of the repository: packages, import directions, file sizes, pins."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import house
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("megakd", "kernels", "launch", "tests", "benchmarks")
SOURCES = sorted(p for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*.py"))
# The rooms by rank: a file imports from its own room or from a lower rank, types included.
RANKS = (
    ("errors",),
    ("plugins", "process"),
    ("config",),
    ("engine", "data"),
    ("models",),
    ("stage",),
    ("losses",),
    ("teachers",),
    ("training",),
    ("methods",),
    ("reports",),
    ("run",),
    ("commands",),
    ("api", "cli"),
    ("__main__",),
)
# What a file may not import although its room may.
FORBIDDEN = {
    "megakd.training.allocation": ("deepspeed", "torch", "transformers"),
    "megakd.methods.assistants": ("deepspeed", "torch", "transformers"),
    "megakd.training.trainer": (
        "megakd.losses",
        "megakd.methods",
        "megakd.models",
        "megakd.teachers",
        "megakd_kernels",
        "transformers",
    ),
    "megakd.reports.plan": ("deepspeed", "megakd.training.trainer"),
    "megakd": ("launch",),
}
MACHINE_PATH = re.compile(r"(?<![\w.$}~/-])/(?:home|root|Users|tmp|work)/\w")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_below(node: ast.AST, *, for_types: bool) -> Iterator[str]:
    """Every module imported below `node`, also inside functions; for types only if asked."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif for_types or not is_for_types_only(child):
            yield from imports_below(child, for_types=for_types)


@cache
def imports_of(path: Path, *, for_types: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(imports_below(tree, for_types=for_types))


def room_of(module: str) -> str:
    """Return the first name below megakd; the package itself has none."""
    return module.split(".")[1] if "." in module else ""


@cache
def paper_of(module: str) -> str:
    """Return the folder of the paper that a module is a file of, or nothing for other modules."""
    parts = module.split(".")[:4]
    is_file = ROOT.joinpath(*parts).with_suffix(".py").is_file()
    return ".".join(parts[:3]) if parts[1:2] == ["methods"] and len(parts) == 4 and is_file else ""


def upward_imports(path: Path) -> list[str]:
    rank = {room: number for number, rooms in enumerate(RANKS) for room in rooms}
    room = room_of(module_name(path))
    ours = [name for name in imports_of(path, for_types=True) if is_within(name, "megakd")]
    return [
        name
        for name in ours
        if room_of(name) != room and rank.get(room_of(name), len(RANKS)) >= rank[room]
    ]


def package_sources() -> list[Path]:
    return [p for p in SOURCES if is_within(module_name(p), "megakd")]


def kernel_sources() -> list[Path]:
    return [p for p in SOURCES if is_within(module_name(p), "megakd_kernels")]


def wrong_imports(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [f for f in imports_of(path) if any(is_within(f, package) for package in forbidden)]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def canonical(requirement: str) -> str:
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_folder_is_listed_for_the_wheel(project: dict[str, Any]) -> None:
    folders = {p.parent for p in [*package_sources(), *kernel_sources()]}
    result = {module_name(folder / "__init__.py") for folder in folders}

    listed = set(project["tool"]["setuptools"]["packages"])

    # The presets are a folder of JSON, found inside the package once it is installed.
    assert listed == result | {"megakd.ds_configs"}


def test_the_installed_package_does_not_put_the_repository_on_the_path(tmp_path: Path) -> None:
    program = (
        "from importlib.util import find_spec; import megakd; assert find_spec('megakd_kernels');"
        "spec = find_spec('kernels'); print(list(spec.submodule_search_locations) if spec else [])"
    )
    command = [sys.executable, "-I", "-c", program]

    assert str(ROOT) not in subprocess.check_output(command, text=True, cwd=tmp_path)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_package_is_found_in_a_folder_that_holds_a_clone_of_its_name(
    project: dict[str, Any], tmp_path: Path
) -> None:
    setuptools = project["tool"]["setuptools"]
    links = {p.name: p.resolve() for p in (ROOT / "src").iterdir() if p.is_symlink()}
    # With this layout, an editable install puts `src` on the path; a finder would come too late.
    assert setuptools["package-dir"] == {"": "src"}
    assert links.keys() == {name.partition(".")[0] for name in setuptools["packages"]}
    (tmp_path / "megakd" / "megakd").mkdir(parents=True)
    program = "import megakd_kernels; from megakd.config.deepspeed import preset_names as names"
    command = [sys.executable, "-c", f"{program}; print(*names())"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    printed = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)

    assert printed.split() == sorted(p.stem for p in (ROOT / "ds_configs").glob("*.json"))


def test_make_install_asks_for_extras_that_exist(project: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    asked = {
        name for extras in re.findall(r"'\.\[(.+?)\]'", makefile) for name in extras.split(",")
    }

    assert asked == {*project["project"]["optional-dependencies"]}


def test_a_file_imports_from_its_own_room_or_a_lower_rank() -> None:
    files = [p for p in package_sources() if room_of(module_name(p))]
    assert {room_of(module_name(p)) for p in files} == {room for rooms in RANKS for room in rooms}

    wrong = {module_name(p): upward_imports(p) for p in files}

    assert {name: one for name, one in wrong.items() if one} == {}


def test_no_files_import_each_other_in_a_circle_also_for_types() -> None:
    known = {module_name(p): p for p in package_sources()}

    def module_of(name: str) -> str:
        return name if name in known or "." not in name else module_of(name.rpartition(".")[0])

    def below(name: str, path: Path) -> set[str]:
        result = {module_of(imported) for imported in imports_of(path, for_types=True)}
        # A method imports the files of its paper when it runs; `megakd.methods` has no order.
        return {other for other in result if is_within(other, "megakd") and paper_of(other) != name}

    graph = {name: below(name, path) for name, path in known.items()}

    # A package's own `__init__` may name the modules of the package.
    order = TopologicalSorter({name: below - {name} for name, below in graph.items()})
    assert set(order.static_order()) >= set(known)  # raises CycleError


def test_the_files_of_a_paper_are_imported_by_their_folder_alone() -> None:
    of_papers = [
        (module_name(p), one)
        for p in package_sources()
        for one in imports_of(p, for_types=True)
        if paper_of(one)
    ]

    assert of_papers
    assert [place for place in of_papers if not is_within(place[0], paper_of(place[1]))] == []


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_some_files_import_even_less(importer: str) -> None:
    paths = [p for p in package_sources() if is_within(module_name(p), importer)]

    wrong = {module_name(p): wrong_imports(p, FORBIDDEN[importer]) for p in paths}

    assert paths
    assert {name: one for name, one in wrong.items() if one} == {}


@pytest.mark.parametrize(
    ("module", "importers"),
    [
        (
            "megakd.run.run_work",
            ("run.main", "run.run_report", "commands.cache", "commands.examination"),
        ),
        ("megakd.cli", ("__main__",)),
        ("deepspeed", ("engine",)),
    ],
    ids=["lab", "command line", "deepspeed"],
)
def test_some_modules_are_imported_by_a_few_alone(module: str, importers: tuple[str, ...]) -> None:
    result = {module_name(p) for p in package_sources() if wrong_imports(p, (module,))}

    assert result
    few = [f"megakd.{one}" for one in importers]
    assert [name for name in result if not any(is_within(name, one) for one in few)] == []


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("kernels/megakd_kernels/**/*.py", {"megakd_kernels", "torch", "triton"}),
        # The model classes that go with a folder.
        ("megakd/models/modeling/modeling_*.py", {"torch", "transformers"}),
    ],
)
def test_some_files_import_a_few_packages_alone(pattern: str, allowed: set[str]) -> None:
    result = {name.split(".")[0] for p in ROOT.glob(pattern) for name in imports_of(p)}

    assert result
    assert result - allowed - sys.stdlib_module_names == set()


# Messages advise the first two, and a command writes the config of the third; none is a paper's.
# Every other method is unknown outside its room.
ADVISED = ("finetune", "single", "shrink")


def test_a_method_is_named_in_its_room_alone() -> None:
    room = ROOT / "megakd" / "methods"
    files = [*room.glob("*.py"), *room.glob("*/__init__.py")]
    runs = [p for p in files if "\ndef run(" in p.read_text(encoding="utf-8")]
    names = {p.parent.name if p.name == "__init__.py" else p.stem for p in runs} - {*ADVISED}
    texts = {p: p.read_text(encoding="utf-8") for p in package_sources() if room not in p.parents}

    naming = {(name, p.name) for name in names for p, text in texts.items() if f'"{name}"' in text}

    assert {"minidisc", "skdbert", "knowledge_selection"} <= names
    assert naming == set()


WRITTEN_IMPORT = re.compile(r"^ *from (megakd(?:\.\w+)*) import (\w+(?:, \w+)*)", re.MULTILINE)


def is_there(module: str, name: str) -> bool:
    place = ROOT.joinpath(*module.split("."))
    if place.with_suffix(".py").is_file() or (place / f"{name}.py").is_file():
        return True
    package = place / "__init__.py"
    is_room = (place / name / "__init__.py").is_file()
    return package.is_file() and (is_room or name in package.read_text(encoding="utf-8"))


def test_imports_in_strings_and_on_pages_name_files_that_exist() -> None:
    result = [
        (p.name, module, name)
        for p in (*SOURCES, ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for module, names in WRITTEN_IMPORT.findall(p.read_text(encoding="utf-8"))
        for name in names.split(", ")
    ]

    assert result
    assert [place for place in result if not is_there(*place[1:])] == []


def test_source_files_have_at_most_800_lines() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {p.name: length for p, length in lengths.items() if length > 800} == {}


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if shown.returncode != 0:
        pytest.skip("needs a git checkout, because the files to read are the files that git tracks")
    tracked = [ROOT / name for name in shown.stdout.splitlines()]
    texts = [p for p in tracked if p.is_file() and p.suffix not in {".png", ".pdf"}]

    result = [p.name for p in texts if MACHINE_PATH.search(p.read_text(encoding="utf-8"))]

    assert texts
    assert result == []


def test_every_dependency_is_pinned_and_the_build_of_torch_is_left_open(project) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonical(name): version for name, version in pairs}
    extras = project["project"]["optional-dependencies"]
    needed = [*project["project"]["dependencies"], *extras["dev"]]

    assert [r for r in needed if canonical(r) not in pins] == []
    assert [name for name in pins if name == "triton" or name.startswith("nvidia-")] == []
    assert [f"{name}=={version}" for name, version in pins.items() if "+" in version] == []


def test_every_test_that_is_listed_as_slow_exists():
    for line in (ROOT / "tests" / "slow_tests.txt").read_text().splitlines():
        path, *_, name = line.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), line


# What a reader must know, measured by tests/support/house.py. A ceiling only falls.
CEILINGS = {
    "files that name views": 40,
    "files that name adapters": 27,
    "files that name generated texts": 20,
    "files that name several learners": 21,
    "files that name mixed vocabulary": 20,
    "files that name several labels": 19,
    "files that name routed rows": 17,
    "files that name streams": 19,
    "files that name servers": 19,
    "files that name windows": 17,
    "files that name soft labels": 12,
    "files that name fewer bits": 14,
    "files that name mixtures": 15,
    "files that name cached answers": 11,
    "files that name fused layers": 10,
    "files that name kept layers": 8,
    "files that import over 20": 8,
    "late or type-only imports": 84,
    "names that several files define": 96,
    "methods called of": 0,
    "annotations Any": 639,
}
CEILINGS_OF_THE_PLAIN_RUN = {
    "plain run: lines of functions": 10_480,
    "plain run: files": 87,
    "plain run: files before the first step": 76,
    "plain run: changes of file before the first step": 3_480,
}


def test_no_feature_is_known_to_more_files_than_before_and_no_file_to_more_others():
    result = house.measures()

    assert result.keys() == CEILINGS.keys()
    assert {name: n for name, n in result.items() if n > CEILINGS[name]} == {}


@pytest.mark.slow
def test_a_plain_run_enters_no_more_files_and_lines_than_before():
    program = [sys.executable, house.__file__, "--run"]
    lines = subprocess.check_output(program, text=True).splitlines()[-4:]

    result = {
        name: int(n.replace(",", "")) for n, name in (line.split(maxsplit=1) for line in lines)
    }

    assert result.keys() == CEILINGS_OF_THE_PLAIN_RUN.keys()
    assert {name: n for name, n in result.items() if n > CEILINGS_OF_THE_PLAIN_RUN[name]} == {}


QUOTED_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?`")
# Names of other programs.
FOREIGN = {"BCEWithLogitsLoss", "CompletionRequest", "CompletionResponseChoice", "mpu"}


def docstrings_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(house.tree_of(path)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
            case _:
                pass


def test_names_in_docstrings_are_names_of_the_code():
    stems: dict[str, set[str]] = {}
    for path in house.sources():
        stems.setdefault(path.stem, set()).update(house.identifiers(path))
    words = {*dir(builtins), *stems, *FOREIGN}
    for path in house.sources():
        documented = {text for _, text in docstrings_of(path)}
        constants = (one for one in ast.walk(house.tree_of(path)) if isinstance(one, ast.Constant))
        texts = {one.value for one in constants if isinstance(one.value, str)} - documented
        words |= {*house.identifiers(path), *re.findall(r"\w+", " ".join(texts))}

    sections = stems["run"] | stems["sections"]

    def is_a_name(quoted: str) -> bool:
        file, _, name = quoted.rpartition(".")
        if name == "json":  # of a file, such as run.json
            return True
        if file in stems and file not in sections:
            return name in stems[file]
        return quoted.isupper() or words.issuperset(quoted.split("."))

    result = [
        (path.name, line, quoted)
        for path in house.sources()
        for line, text in docstrings_of(path)
        for quoted in QUOTED_NAME.findall(text)
    ]

    assert result
    assert [place for place in result if not is_a_name(place[2])] == []
