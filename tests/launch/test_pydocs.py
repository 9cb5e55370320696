"""The corpus of docstrings: what is read, what is masked, and how it is split."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
pydocs = SimpleNamespace(**runpy.run_path(str(ROOT / "launch" / "pydocs.py")))


def write_packages(root: Path, counts: dict[str, int]) -> Path:
    for package, count in counts.items():
        # The package's name is masked, so the noise word keeps the texts of packages apart.
        name = f"{package} {package[::-1]}"
        functions = (
            f'def f{n}():\n    """Return the alpha of {name} thing {n}.\n\n'
            '    The thing is a long one that is said in many words."""\n'
            for n in range(count)
        )
        (root / package).mkdir(parents=True)
        source = "".join([f'"""Things of {name}."""\n', *functions])
        (root / package / "__init__.py").write_text(source)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_packages(tmp_path / "site-packages", {"scipy": 60, "sympy": 40, "other": 10})


def masked(text: str) -> str:
    return pydocs.NAMED.sub("package", text)


def texts_of(*roots: Path) -> list[str]:
    return [text for _, text in pydocs.docstrings(pydocs.source_files(roots))]


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
try:
    async def d():
        """Conditional."""
except ValueError:
    def e(): x = """No docstring."""
    def f(): """In a handler."""
'''
    (tmp_path / "m.py").write_text(source)

    expected = ["Module.", "Class\nindented.", "Method.", "Inner.", "Conditional.", "In a handler."]
    assert texts_of(tmp_path) == expected


def test_files_that_are_no_python_are_left_out(tmp_path):
    (tmp_path / "a.py").write_text('print "python 2" """x"""')
    (tmp_path / "b.py").write_bytes(b'"""\xff\xfe not UTF-8"""')
    (tmp_path / "c.py").write_bytes('# coding: latin-1\n"""Café."""'.encode("latin-1"))
    (tmp_path / "d.py").write_text('"""An \\d old escape."""')
    (tmp_path / "e.py").write_text('"""Half \\ud800 a pair."""')

    assert texts_of(tmp_path) == ["Café.", "An \\d old escape.", "Half  a pair."]


def test_a_package_is_read_where_python_finds_it_without_tests_and_vendored_copies(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    left_out = ("torch/tests/m.py", "torch/_vendor/b/m.py", "megakd/m.py", "torch/__pycache__/m.py")
    read = (one / "torch" / "m.py", two / "numpy.py")
    for path in (*read, two / "torch" / "m.py", *map(one.joinpath, left_out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""A text."""')
    (one / "torch" / "gone.py").symlink_to(tmp_path / "nowhere.py")

    sources = pydocs.source_files([one, two])

    assert sources == [*zip(("torch", "numpy"), read, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is_scipy_available and numpy_dtype", "is_package_available and package_dtype"),
        ("NumPy's np.array", "package's package.array"),
        ("scikit-learn or Scikit learn", "package or package"),
        ("pandemonium and spades stay", "pandemonium and spades stay"),
    ],
)
def test_names_of_packages_are_masked(text, expected):
    assert masked(text) == expected


@pytest.mark.parametrize("name", [*pydocs.PACKAGES, *pydocs.ALIASES])
def test_no_name_survives_in_any_surrounding(name):
    written = (name, name.upper(), f"`{name.title()}`", f"_{name}.fft", f"({name}'s)", f"-{name}:")
    text = masked(" ".join(written))

    words = re.split(r"[\W_]+", text.lower())
    assert not {*pydocs.PACKAGES, name.lower()} & set(words)
    assert words.count("package") == len(written)


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

    assert pydocs.labelled(corpus) == [("numpy", f"Sort the package array, {words}.")]
    for text in ("abc", "ab, c.", "a B"):
        same = f" {text.upper()}!"
        assert pydocs.split_of(text, "texts") == pydocs.split_of(same, "texts")


def test_all_packages_have_the_same_number_of_texts_by_turns():
    rows = [("sympy", f"text {n}") for n in range(50)] + [("numpy", f"word {n}") for n in range(30)]

    packages = [package for package, _ in pydocs.balanced([*rows, ("pandas", "a single text")])]

    assert packages == ["numpy", "sympy"] * 30


def test_the_labels_are_packages_and_the_splits_share_no_text(root, tmp_path):
    rows = pydocs.rows_of("labels", [root])

    pydocs.write(rows, "labels", tmp_path / "rows")

    lines = {path.stem: path.read_text().splitlines() for path in (tmp_path / "rows").iterdir()}
    assert sorted(lines) == ["test", "train", "validation"]
    assert [json.loads(n) for n in lines["train"]] == [r for r in rows if split(r) == "train"]
    assert sum(map(len, lines.values())) == len({r["text"] for r in rows}) == 40 + 40
    for row in rows:
        assert ("ypics" in row["text"]) == (row["label"] == "scipy")
        assert "scipy" not in row["text"]


# A run of the quickstart reads each validation row a dozen times, and each test row three times.
@pytest.mark.parametrize(("view", "test", "validation"), [("labels", 110, 30), ("texts", 20, 20)])
def test_each_view_holds_out_its_shares(view, test, validation):
    splits = [pydocs.split_of(f"text {n}", view) for n in range(10_000)]

    counts = [splits.count(name) / 10 for name in ("test", "validation")]
    assert counts == pytest.approx([test, validation], abs=10)


def split(row: dict[str, str]) -> str:
    return pydocs.split_of(row["text"], "labels")


def test_the_texts_have_every_docstring_once(root):
    (root / "other" / "copy.py").write_text((root / "other" / "__init__.py").read_text())

    texts = [row["text"] for row in pydocs.rows_of("texts", [root])]

    assert len(texts) == len(set(texts)) == 60 + 40 + 10 + 3
    start = "Return the alpha of scipy ypics thing 0.\n\nThe thing is a long one"
    assert sum(text.startswith(start) for text in texts) == 1
