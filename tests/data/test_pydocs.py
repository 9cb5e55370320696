"""The corpus of docstrings: what is read, what is masked, and how it is split."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.data import pydocs
from megakd.data.pydocs import (
    ALIASES,
    PACKAGES,
    balanced,
    classification_rows,
    masked,
    pydocs_rows,
    read_docstrings,
    source_files,
    split_of,
)
from megakd.errors import DataError

CLASSIFICATION = TaskConfig(type="classification", dataset="pydocs")
TEXT = TaskConfig(type="causal_lm", dataset="pydocs")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def write_packages(root: Path, counts: dict[str, int]) -> Path:
    for package, count in counts.items():
        # The package's name is masked, so the noise word keeps the texts of packages apart.
        name = f"{package} {package[::-1]}"
        functions = (
            f'def f{n}():\n    """Return the {WORDS[n % 8]} of {name} thing {n}.\n\n'
            '    The thing is a long one that is said in many words."""\n'
            for n in range(count)
        )
        source = f'"""Things of {name} about {WORDS[len(name) % 8]}."""\n' + "".join(functions)
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(source)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_packages(tmp_path / "site-packages", {"scipy": 60, "sympy": 40, "other": 10})


@pytest.fixture
def rows_of(root, tmp_path):
    """Read the rows of a task from the packages of the test."""
    return lambda task: pydocs_rows(task, cache_dir=tmp_path / "cache", roots=[root])


def test_docstrings_come_in_source_order_and_without_import(tmp_path):
    source = '''"""Module."""
raise SystemExit("imported")
class A:
    """Class
        indented."""
    def b(self):
        """Method."""
        def c():
            \'\'\'Inner.\'\'\'
if True:
    async def d():
        """Conditional."""
else:
    def e():
        x = """No docstring."""
try:
    pass
except ValueError:
    def f():
        """In a handler."""
'''
    (tmp_path / "m.py").write_text(source)

    texts = [doc.text for doc in read_docstrings(source_files([tmp_path])) if doc is not None]

    expected = ["Module.", "Class\nindented.", "Method.", "Inner.", "Conditional.", "In a handler."]
    assert texts == expected


def test_files_that_are_no_python_are_counted_and_left_out(tmp_path):
    (tmp_path / "a.py").write_text('print "python 2" """x"""')
    (tmp_path / "b.py").write_bytes(b'"""\xff\xfe not UTF-8"""')
    (tmp_path / "c.py").write_bytes('# coding: latin-1\n"""Café."""'.encode("latin-1"))
    (tmp_path / "d.py").write_text('"""An \\d old escape."""')
    (tmp_path / "e.py").write_text('"""Half \\ud800 a pair."""')

    result = list(read_docstrings(source_files([tmp_path])))

    assert [doc and doc.text for doc in result] == [
        None,
        None,
        "Café.",
        "An \\d old escape.",
        "Half  a pair.",
    ]


def test_tests_vendored_copies_and_megakd_itself_are_left_out(tmp_path):
    for name in ("a", "a/tests", "a/_vendor/b", "megakd", "a/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "m.py").write_text('"""A text."""')
    (tmp_path / "a" / "gone.py").symlink_to(tmp_path / "nowhere.py")

    assert [file.name for file in source_files([tmp_path])] == ["a/m.py"]


def test_a_package_in_two_places_is_read_where_python_would_find_it(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "torch").mkdir(parents=True)
        (tmp_path / place / "torch" / "m.py").write_text(f'"""From {place}."""')
    (tmp_path / "two" / "numpy.py").write_text('"""Only here."""')

    files = source_files([tmp_path / "one", tmp_path / "two"])

    assert [(f.package, f.path.parent) for f in files] == [
        ("torch", tmp_path / "one" / "torch"),
        ("numpy", tmp_path / "two"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A pandas.Series of Pandas", "A package.Series of package"),
        ("is_scipy_available and numpy_dtype", "is_package_available and package_dtype"),
        ("NumPy's np.array", "package's package.array"),
        ("scikit-learn or Scikit learn", "package or package"),
        ("pandemonium and spades stay", "pandemonium and spades stay"),
    ],
)
def test_names_of_packages_are_masked(text, expected):
    assert masked(text) == expected


@settings(max_examples=40)
@given(
    st.sampled_from([*PACKAGES, *ALIASES]),
    st.sampled_from([str.upper, str.title, str]),
    st.sampled_from(["", " ", ".", "_", "`", "(", "-"]),
    st.sampled_from(["", " ", ".fft", "_x", "`", ")", "'s", ":"]),
)
def test_no_name_survives_in_any_surrounding(name, case, before, after):
    text = masked(f"the{before or ' '}{case(name)}{after or ' '} here")

    words = re.split(r"[\W_]+", text.lower())
    assert not {*PACKAGES, name.lower()} & set(words)
    assert "package" in words


def test_a_text_of_two_packages_belongs_to_none():
    words = "the rows of which are sorted by the first column"
    corpus = [
        ("scipy", f"Return a new array, {words}."),
        ("numpy", f"Return a  NEW array, {words}"),
        ("numpy", f"Sort the\nscipy array, {words}."),
        ("numpy", f"Sort the numpy array, {words}."),
        ("other", f"Not one of the classes, {words}."),
        ("numpy", "Only eight words, which is too few here"),
    ]

    assert classification_rows(corpus) == [("numpy", f"Sort the package array, {words}.")]
    for text in ("abc", "ab, c.", "a B"):
        assert split_of(text, "text") == split_of(f" {text.upper()}!", "text")


def test_all_packages_have_the_same_number_of_texts_by_turns():
    rows = [("sympy", f"text {n}") for n in range(50)] + [("numpy", f"word {n}") for n in range(30)]

    packages = [package for package, _ in balanced([*rows, ("pandas", "a single text")])]

    assert packages == ["numpy", "sympy"] * 30


def test_the_classification_view_names_its_classes_and_the_packages_that_are_missing(
    rows_of, caplog
):
    result = rows_of(CLASSIFICATION)

    assert "pydocs: networkx, numpy, pandas, sklearn not found" in caplog.text

    assert result.classes.names == ("scipy", "sympy")
    assert result.metrics == ("accuracy",)
    texts = {name: rows["text"][:] for name, rows in result.splits.items()}
    assert sum(map(len, texts.values())) == 40 + 40
    assert not set(texts["train"]) & {*texts["validation"], *texts["test"]}
    assert "scipy" not in " ".join(texts["train"])
    for row in result.splits["train"]:
        assert ("ypics" in row["text"]) == (row["label"] == 0)


def test_the_text_view_has_every_docstring_once(rows_of, root):
    (root / "other" / "copy.py").write_text((root / "other" / "__init__.py").read_text())

    result = rows_of(TEXT)

    texts = [text for rows in result.splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) == 60 + 40 + 10 + 3
    start = "Return the alpha of scipy ypics thing 0.\n\nThe thing is a long one"
    assert sum(text.startswith(start) for text in texts) == 1
    assert result.splits["train"].column_names == ["text"]


def test_fewer_than_two_packages_are_refused(tmp_path):
    root = write_packages(tmp_path / "site-packages", {"scipy": 100, "sympy": 3})

    with pytest.raises(DataError, match=r"pydocs: only 1 of its packages .* needs at least 2"):
        pydocs_rows(CLASSIFICATION, cache_dir=tmp_path / "cache", roots=[root])


def test_the_corpus_is_built_once_and_anew_when_a_module_or_the_length_of_texts_changes(
    rows_of, root, monkeypatch
):
    calls = []
    read = pydocs.read_docstrings
    monkeypatch.setattr(pydocs, "read_docstrings", lambda files: calls.append(1) or read(files))

    hashes = [rows_of(task).source_hash for task in (CLASSIFICATION, TEXT, CLASSIFICATION)]
    text = " ".join(WORDS * 2)
    (root / "sympy" / "new.py").write_text(f'"""Return something that is new here: {text}."""')
    fresh = rows_of(CLASSIFICATION).source_hash

    assert len(calls) == 3
    assert hashes[0] == hashes[2] != hashes[1]
    assert fresh != hashes[0]
    monkeypatch.setattr(pydocs, "MOST_CHARACTERS", 80)
    assert rows_of(CLASSIFICATION).source_hash != fresh
