"""The README and the pages show commands, configs and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cut_families import FAMILIES

from megakd.cli import main, train_main
from megakd.config.file import load_config
from megakd.config.options import METHODS
from megakd.config.terms import TERMS


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(repository: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in (repository / "docs").glob("*.md")}


def block(page: str, language: str) -> str:
    block = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert block, f"the page has no {language} block"
    return block[1]


def test_it_has_at_most_900_words(readme):
    assert len(readme.split()) <= 900


def test_its_first_screen_has_a_command_and_a_number_for_a_classifier_and_for_a_chat_model(readme):
    first = readme[: readme.index("## Install")]
    command = r"```bash\nmegakd shrink (\S+) --(?:speedup|parameters) \S+ --data "

    assert len(first.split()) < 160
    for of in ("classifier", "chat"):
        assert re.search(rf"\*\*A smaller {of}.*?\d.*?{command}", first, re.DOTALL)


def test_the_run_config_of_the_first_page_is_valid(pages, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block(pages["index.md"], "yaml"))

    assert load_config(path).method.name == "single"


def test_the_training_commands_it_lists_are_accepted(readme, repository, capsys):
    commands = re.findall(r"`deepspeed launch/train.py --config ([^\s`]+)([^`]*)`", readme)

    assert len(commands) > 8
    for config, overrides in commands:
        words = ["--config", str(repository / config), *overrides.split(), "--print-config"]
        assert train_main(words) == 0, (config, capsys.readouterr().err)


def test_it_names_every_method(readme):
    assert [n for n in METHODS.names() if f"`{n}`" not in readme] == []


@pytest.mark.parametrize(
    ("page", "names"), [("losses.md", TERMS.names()), ("families.md", FAMILIES)]
)
def test_the_pages_name_every_loss_and_family(pages, page, names):
    assert [name for name in names if f"`{name}`" not in pages[page]] == []


def test_the_commands_they_list_exist(readme, pages, capsys):
    for command in set(re.findall(r"`megakd (\w+)[^`]*`", readme + pages["index.md"])):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0, command
        assert capsys.readouterr().out


def test_the_make_targets_it_names_exist(readme, repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")

    for target in set(re.findall(r"make (quickstart|test|lint|install)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_files_it_links_to_exist(repository, page):
    text = (repository / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text)
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_the_result_table_is_a_real_one(readme):
    table = block(readme, "text")

    for model in ("teacher", "student", "alone"):
        assert re.search(rf"^{model} +[\d.]+M .*%", table, re.MULTILINE)
