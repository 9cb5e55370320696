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


def test_the_quickstart_distils_with_an_undistilled_baseline_on_a_batch_of_64(repository):
    config = load_config(repository / "launch" / "examples" / "quickstart.yaml")

    assert config.baselines == ("alone", "direct")
    assert config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps == 32


def test_the_single_teacher_that_the_pool_example_compares_with_learns_from_soft_targets_alone(
    repository: Path,
) -> None:
    path = repository / "launch" / "examples" / "skdbert_glue.yaml"
    suggested = re.findall(r"'((?:method|objective)=[^']*)'", path.read_text(encoding="utf-8"))
    single = suggested[next(i for i, s in enumerate(suggested) if "name: single" in s) :]

    config = load_config(path, single)

    assert [term.loss for term in config.objective or ()] == ["soft_target_kl"]
