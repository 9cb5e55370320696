"""The run configs that ship with megakd."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megakd.config.deepspeed import load_ds_config
from megakd.config.file import load_config

EXAMPLES = sorted((Path(__file__).parents[2] / "launch" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_run_config_with_known_presets(path: Path) -> None:
    config = load_config(path)

    assert load_ds_config(config.student.deepspeed, where="student.deepspeed")
    assert config.output_dir == Path("runs") / path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")
    if path.stem.startswith("minidisc_"):
        assert load_config(path, ("method.name=maxidisc",)).method.name == "maxidisc"


def test_the_quickstart_compares_with_the_labels_alone_for_as_many_steps(repository):
    config = load_config(repository / "launch" / "examples" / "quickstart.yaml")

    assert (config.method.name, config.baselines) == ("shrink", ("alone",))
    assert config.eval.metric == "f1_macro"
    assert config.method.candidates == 1  # no trial, whose steps would count
    assert config.trainings["alone"].max_steps == config.trainings["train"].max_steps


def test_the_single_teacher_that_the_pool_example_compares_with_learns_from_soft_targets_alone(
    repository: Path,
) -> None:
    path = repository / "launch" / "examples" / "skdbert_glue.yaml"
    suggested = re.findall(r"'((?:method|objective)=[^']*)'", path.read_text(encoding="utf-8"))
    single = suggested[next(i for i, s in enumerate(suggested) if "name: single" in s) :]

    config = load_config(path, single)

    assert [term.loss for term in config.objective or ()] == ["soft_target_kl"]
