import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig

from megakd.errors import ModelError
from megakd.models.architectures import pools_by_padding
from megakd.models.fitting import head_order, label_order, set_labels


def named(*names):
    return BertConfig(id2label=dict(enumerate(names)))


def test_names_in_another_order_give_the_index_that_restores_the_datas_order():
    order = label_order(named("c", "a", "b"), ("a", "b", "c"), where="teacher.model")
    assert order == (1, 2, 0)
    assert [("c", "a", "b")[column] for column in order] == ["a", "b", "c"]
    assert head_order(named("b", "a"), ("a", "b")) == (1, 0)


@pytest.mark.parametrize(
    ("stored", "data"),
    [
        (("a", "b"), ("a", "b")),
        (("NEGATIVE", "Positive"), ("negative", "positive")),
        (("LABEL_0", "LABEL_1"), ("0", "1")),
        (("LABEL_0",), ()),
    ],
    ids=["same", "case", "numbers", "no labels"],
)
def test_nothing_is_to_be_done_where_the_order_is_right(stored, data):
    assert label_order(named(*stored), data, where="teacher.model") is None
    assert head_order(named(*stored), data) == tuple(range(len(stored)))


@pytest.mark.parametrize(
    ("stored", "data", "message"),
    [
        ("ab", "abc", r"teacher.model: the model has 2 labels .* the data 3"),
        ("ab", "0123456", r"data 7 \(0, 1, 2, 3, 4, …\)"),
        ("ax", "ab", r"the model's labels \(a, x\) are not those of the data"),
        (("LABEL_0", "LABEL_1"), ("a", "b"), r"write the data's labels into id2label"),
        # A name that is repeated may hide that another is missing.
        ("aA", "ab", r"the model's labels \(a, A\) are not those of the data"),
        (("US", "us", "a"), ("US", "Us", "a"), r"labels \(US, us, a\) are not those of the data"),
    ],
)
def test_labels_that_do_not_match_are_an_error_with_both_lists(stored, data, message):
    assert head_order(named(*stored), tuple(data)) is None
    with pytest.raises(ModelError, match=message):
        label_order(named(*stored), tuple(data), where="teacher.model")


def test_labels_that_differ_only_in_case_are_matched_exactly():
    assert label_order(named("us", "Other", "US"), ("US", "us", "other"), where="x") == (2, 0, 1)
    assert head_order(named("US", "us"), ("US", "us")) == (0, 1)
    assert head_order(named("us", "US"), ("US", "us")) == (1, 0)


def test_labels_are_written_into_a_config():
    classifier, regressor = BertConfig(), BertConfig()
    set_labels(classifier, ("x", "y", "z"))
    set_labels(regressor, ())
    assert (classifier.num_labels, classifier.label2id) == (3, {"x": 0, "y": 1, "z": 2})
    assert (regressor.num_labels, regressor.problem_type) == (1, "regression")


def test_decoders_pool_by_the_padding_token_and_encoders_do_not():
    assert all(pools_by_padding(c(), "classification") for c in (GPT2Config, LlamaConfig))
    assert not any(pools_by_padding(c(), "classification") for c in (BertConfig, RobertaConfig))
    assert not pools_by_padding(GPT2Config(), "causal_lm")
