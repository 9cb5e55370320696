"""A cache teaches only students whose logits are the product of their output matrix."""

from __future__ import annotations

import pytest
from tiny_runs import config_tree, llama, write_config

from megakd.config.file import load_config
from megakd.config.models import ScratchModel
from megakd.errors import ConfigError
from megakd.inputs.inputs import check_caches
from megakd.models.loading import resolve_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SERVER = {"url": ["http://a:1"]}


def checked(tmp_path, family, *, cache="answers", server=None, **keys):
    """Checks a run whose teacher is cached or served and whose student is of a family."""
    own = {"model": "served", "server": server} if server else {"model": llama(2)}
    tree = config_tree(
        tmp_path / "out",
        {"type": "causal_lm", "dataset": "pydocs"},
        teacher={**own, **({"cache": str(tmp_path / cache)} if cache else {})},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}],
    )
    config = load_config(write_config(tmp_path / "run.yaml", tree), [])
    spec = ScratchModel(config={"model_type": family, **SIZES, **keys})
    check_caches(config, resolve_model(spec, config.task, where="student.model"))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("gemma2", {}, r"gemma2 student .*\(final_logit_softcapping: 30.0\)"),
        ("granite", {"logits_scaling": 0.5}, r"granite student .*\(logits_scaling: 0.5\)"),
    ],
)
def test_a_student_with_a_cap_or_a_factor_is_refused(tmp_path, family, keys, message):
    with pytest.raises(ConfigError, match=f"^teacher.cache: the {message}"):
        checked(tmp_path, family, **keys)
    checked(tmp_path, family, cache=None, **keys)
    with pytest.raises(ConfigError, match=f"^teacher.server: the {message}"):
        checked(tmp_path, family, cache=None, server=SERVER, **keys)
    # Exported hidden states teach every student.
    checked(tmp_path, family, cache=None, server={**SERVER, "states": str(tmp_path)}, **keys)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("gemma3_text", {}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_other_students_learn_from_a_cache(tmp_path, family, keys):
    checked(tmp_path, family, **keys)
