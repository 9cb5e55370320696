"""vLLM servers: texts and probabilities that are asked for, refused answers, and other weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_stubs import END, VOCABULARY, Counting, Stub, serving
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.config.sections import Sampling
from megakd.errors import ServerError
from megakd.models.generation import Completion
from megakd.teachers.servers import BestTokens, Requirements, ServedModel, VllmServer
from megakd.training.generated_texts import check_texts
from megakd.training.served_teachers import check_scores, difference

REQUIREMENTS = Requirements("tiny", 20, VOCABULARY, (END,))
TINY, SAMPLING = ServedModel("tiny"), Sampling(8, temperature=0.5)
PROMPTS = [(4, 5), (6, 7, 8), (9,), (2, 3)]
TEXTS = "/v1/completions"
CONTROL = ("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache?reset_external=true")
CONTROL = (*CONTROL, "/update_weight_version", "/resume")


def connected(stub: Stub) -> VllmServer:
    return VllmServer(stub.url, time_limit_s=30, patience_s=0.2)


def completion(
    stub: Stub,
    sampling: Sampling = SAMPLING,
    requirements: Requirements = REQUIREMENTS,
    model: ServedModel = TINY,
) -> Completion:
    return connected(stub).complete((5, 30), 2**62 + 7, sampling, requirements, model=model)


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    with serving(stub):
        yield stub


def spoil_texts(stub: Stub, **keys: Any) -> None:
    """Change the text of every answer; `choices` takes the place of all texts."""

    def change(path: str, tree: Any) -> Any:
        if path == TEXTS:
            choices = [{**tree["choices"][0], **keys}]
            tree["choices"] = keys.get("choices", choices)
        return tree

    stub.spoil = change


def test_a_text_comes_back_with_its_end_token_or_is_not_finished_at_the_limit(stub: Stub):
    assert completion(stub) == Completion((33, 36, 39, END), finished=True)
    assert completion(stub, Sampling(2)) == Completion((33, 36), finished=False)
    spoil_texts(stub, token_ids=[33, END, 36, 39])
    assert completion(stub) == Completion((33, END), finished=True)


def test_all_sampling_rules_are_stated(stub: Stub):
    """A server takes rules that are left out from the generation config of its model."""
    completion(stub, Sampling(8, temperature=0.5, top_p=0.9, top_k=20))

    rules = stub.of(TEXTS)[0]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "stop_token_ids": [END], "n": 1}
    assert rules.items() >= (wanted | {"seed": 2**62 + 7}).items()
    stub.asked.clear()
    completion(stub)
    assert stub.of(TEXTS)[0]["top_k"] == -1  # all tokens may be drawn


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"token_ids": [33] * 10}, "a text of 10 tokens came back, and 1 to 8 were asked for"),
        ({"token_ids": [33, None]}, r"choices\.0\.token_ids\.1: Input should be a valid integer"),
        ({"token_ids": [33, -5, END]}, r"token_ids\.1: Input should be greater than or equal to 0"),
        ({"token_ids": [33, VOCABULARY, END]}, "token 40, and the student .* have 40 tokens"),
        ({"token_ids": [33], "finish_reason": "abort"}, r"broken off .*\(finish_reason abort\)"),
        ({"token_ids": [33, 36]}, r"broken off after 2 tokens .*, and 8 .* larger --max-model-len"),
        ({"token_ids": None}, "no token_ids.* newer version of vLLM"),
        ({"prompt_token_ids": None}, "no token_ids.* newer version of vLLM"),
        ({"prompt_token_ids": [5, 31]}, "about another prompt than the one of 2 tokens"),
        ({"choices": []}, "/v1/completions: the answer cannot be read"),
        ({"choices": [None]}, "/v1/completions: the answer cannot be read"),
    ],
)
def test_an_answer_of_other_tokens_than_asked_for_is_refused(stub: Stub, keys: Any, message: str):
    spoil_texts(stub, **keys)

    with pytest.raises(ServerError, match=message):
        completion(stub)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words `w0` to `w39`."""
    tokens = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, "w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=f"w{END}")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", Completion((33, 36, END), finished=True)),
        ("length", Completion((33, 36), finished=False)),
    ],
)
def test_another_server_with_the_api_of_openai_answers_with_text_alone(
    stub: Stub, reason, expected
):
    stub.owner = "llamacpp"
    spoil_texts(stub, text="w33 w36", token_ids=None, prompt_token_ids=None, finish_reason=reason)
    requirements = REQUIREMENTS._replace(tokenizer=words())
    model = connected(stub).model(requirements)

    assert completion(stub, requirements=requirements, model=model) == expected

    rules = {"model", "prompt", "max_tokens", "n", "seed", "temperature", "top_p"}
    assert stub.of(TEXTS)[0].keys() == rules
    assert stub.of(TEXTS)[0]["seed"] < 2**31


def test_adapters_are_loaded_asked_and_unloaded_by_requests_that_may_arrive_twice(
    stub: Stub, tmp_path: Path
):
    """vLLM refuses a second load with 400, and a second unload with 404."""
    stub.lost = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    server = VllmServer(stub.url, time_limit_s=30)
    server.load_adapter("run-1", tmp_path)
    assert server.adapters() == ["run-1"]
    assert server.model(REQUIREMENTS).name == "tiny"
    assert completion(stub, model=ServedModel("run-1")).finished
    server.unload_adapter("run-1")
    with pytest.raises(ServerError, match="`run-1` does not exist"):
        completion(stub, model=ServedModel("run-1"))
    answer = stub.answer
    stub.answer = lambda path, body: answer(path.replace("/v1/load", "/gone"), body)
    with pytest.raises(ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        server.load_adapter("run-2", tmp_path)
    assert len(stub.of("/v1/load_lora_adapter")) == len(stub.of("/v1/unload_lora_adapter")) == 2


# Replicas before a run.


@pytest.fixture
def pair() -> Iterator[tuple[Stub, Stub]]:
    stubs = Stub(), Stub()
    with serving(*stubs):
        yield stubs


def checked(*stubs: Stub, requirements: Requirements = REQUIREMENTS) -> None:
    check_texts([connected(stub) for stub in stubs], PROMPTS, requirements, SAMPLING)


def test_equal_replicas_pass_and_each_is_asked_once_per_prompt(pair):
    checked(*pair)

    for stub in pair:
        asked = [(tuple(body["prompt"]), body["temperature"]) for body in stub.of(TEXTS)]
        assert asked == [(PROMPTS[0], 0.5), *((prompt, 0.0) for prompt in PROMPTS)]
    checked(*pair, requirements=REQUIREMENTS._replace(name="/models/tiny"))  # the path of the model


class Deviating(Counting):
    """Continues one prompt in another way."""

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        ids = super().continue_(prompt, rules)
        return [*ids[:2], 0, *ids[3:]] if prompt == [6, 7, 8] else ids


def test_replicas_that_disagree_are_refused_with_prompt_and_texts(pair):
    pair[1].model = Deviating()
    texts = "3 tokens, beginning with [6, 7, 8], are [11, 14, 17, 20 … and [11, 14, 0, 20"

    with pytest.raises(ServerError) as caught:
        checked(*pair)

    for part in (f"{pair[0].url} and {pair[1].url} disagree", *texts.split(" … ")):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "big", "path": "/models/big"}, r"serves big, and the run needs tiny; start"),
        ({"context": 19}, r"context of 19 tokens, and .* have 20"),
    ],
    ids=["model", "context"],
)
def test_a_replica_that_does_not_fit_is_refused(pair, changes, message):
    vars(pair[1]).update(changes)

    with pytest.raises(ServerError, match=message):
        checked(*pair)


# Weights that a run pushes.


class Loading(Counting):
    """Counts in steps as wide as the name of the folder that was loaded last says."""

    def __init__(self) -> None:
        self.step = 3

    def load(self, folder: Path) -> None:
        self.step = int(folder.name)

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        steps = range(1, rules["most"] + 1)
        return [2 + (prompt[-1] - 2 + self.step * k) % (VOCABULARY - 2) for k in steps]  # no END


PUSHED = REQUIREMENTS._replace(takes_weights=True)
OLD, NEW = ServedModel("tiny", weights="default"), ServedModel("tiny", weights="run-4")


@pytest.fixture
def loading() -> Iterator[Stub]:
    stub = Stub(model=Loading())
    stub.development = True
    with serving(stub):
        yield stub


def ids_of(stub: Stub, model: ServedModel = TINY) -> tuple[int, ...]:
    return completion(stub, Sampling(8, temperature=0.0), model=model).ids[:2]


def folder_of(place: Path) -> Path:
    (place / "5").mkdir()
    return place / "5"


def test_weights_are_read_while_the_server_is_paused_and_stated_by_later_texts(loading, tmp_path):
    server, folder = connected(loading), folder_of(tmp_path)
    assert ids_of(loading, OLD) == (33, 36)

    server.load_weights(folder, "run-4")

    assert ids_of(loading, NEW) == (35, 2)
    with pytest.raises(ServerError, match="with the weights run-4, and default were pushed"):
        ids_of(loading, OLD)
    assert tuple(path for path, _ in loading.asked if path in CONTROL) == CONTROL
    call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    assert loading.of("/collective_rpc") == [call]
    assert server.model(PUSHED) == NEW


@pytest.mark.parametrize("deaf", ["/pause?mode=wait", "/reset_prefix_cache?reset_external=true"])
def test_no_text_comes_from_prefixes_of_earlier_weights(loading, tmp_path, deaf):
    """Each of the two requests empties the cache; a server may ignore one of them."""
    answer = loading.answer
    silent = {"success": True, "status": "paused"}
    loading.answer = lambda path, body: (200, silent) if path == deaf else answer(path, body)
    ids_of(loading)

    connected(loading).load_weights(folder_of(tmp_path), "run-4")

    assert ids_of(loading) == (35, 2)


@pytest.mark.parametrize(
    ("is_paused", "ids", "model"),
    [(False, (33, 36), OLD), (True, (35, 2), NEW)],
    ids=["in work", "asked for meanwhile"],
)
def test_texts_in_work_are_finished_with_their_weights_and_later_ones_wait_for_the_new(
    loading, tmp_path, is_paused, ids, model
):
    loading.delay_s, loading.paused = 0.0 if is_paused else 0.2, is_paused
    result: list[tuple[int, ...]] = []
    texts = threading.Thread(target=lambda: result.append(ids_of(loading, model)))
    texts.start()
    while not (loading.of(TEXTS) if is_paused else loading.at_once):
        time.sleep(0.01)

    connected(loading).load_weights(folder_of(tmp_path), "run-4")
    texts.join()

    assert result == [ids]


def test_a_folder_that_the_server_does_not_read_is_named_with_replica_and_version(
    loading, tmp_path
):
    server = connected(loading)

    with pytest.raises(ServerError) as caught:
        server.load_weights(tmp_path / "gone", "run-4")

    refused = f"{loading.url}/collective_rpc answered 500 and did not load run-4 from {tmp_path}"
    for part in (refused, "Call to collective_rpc method failed", "the server is paused now"):
        assert part in str(caught.value)
    # The weights may be incomplete: no text may come from them.
    assert (loading.paused, loading.weights) == (True, "default")

    server.load_weights(folder_of(tmp_path), "run-4")
    assert ids_of(loading, NEW) == (35, 2)


def test_a_cache_that_is_not_emptied_is_refused_before_the_server_goes_on(loading, tmp_path):
    loading.spoil = lambda path, tree: {"success": False} if path.startswith("/reset") else tree

    with pytest.raises(ServerError, match="did not empty the cache of prefixes"):
        connected(loading).load_weights(folder_of(tmp_path), "run-4")

    assert loading.paused


def test_a_server_outside_development_mode_names_the_variable(stub, tmp_path):
    server = connected(stub)
    for action in (lambda: server.model(PUSHED), lambda: server.load_weights(tmp_path, "run-4")):
        with pytest.raises(ServerError, match=r"answered 404; .* variable VLLM_SERVER_DEV_MODE=1"):
            action()


def test_texts_state_the_versions_of_their_weights_if_weights_are_pushed(loading):
    spans = [{"version": "run-4", "start": 0, "end": 3}, {"version": "run-5", "start": 3, "end": 8}]
    spoil_texts(loading, weight_versions=spans)
    with pytest.raises(ServerError, match="with the weights run-4, run-5, and run-4 were pushed"):
        ids_of(loading, NEW)
    for nothing in (None, []):
        spoil_texts(loading, weight_versions=nothing)
        with pytest.raises(ServerError, match=r"no weight_versions.*from 0\.33 on"):
            ids_of(loading, NEW)
        assert ids_of(loading, TINY) == (33, 36)  # nothing is pushed here


def test_replicas_are_compared_only_if_they_state_the_same_weights(loading):
    """A run was killed after one of two replicas had got new weights; a third is paused."""
    other, paused = Stub(model=Loading()), Stub(model=Loading())
    other.development = paused.development = paused.paused = True
    other.model.step, other.weights = 5, "run-4"
    with serving(other, paused):
        checked(loading, other, paused, requirements=PUSHED)
        assert paused.of(TEXTS) == []
        other.weights = "default"
        with pytest.raises(ServerError, match="disagree"):
            checked(loading, other, requirements=PUSHED)


# Probabilities.


TEXT = (5, 8, 30, 2)


def test_the_best_tokens_of_every_position_come_in_order(stub: Stub):
    answer = connected(stub).top_k(TEXT, 4, "tiny")

    expected = Counting().scores(list(TEXT))
    assert len(answer.ids) == len(TEXT) - 1
    for ids, logprobs, values in zip(answer.ids, answer.logprobs, expected[:-1], strict=True):
        order = sorted(range(VOCABULARY), key=lambda token: -values[token])
        assert ids.tolist() == order[:4]
        assert logprobs == pytest.approx([values[token] for token in order[:4]])
    # The text's own token, which vLLM adds to every position, may be unlikely.
    raw = stub.answer(TEXTS, {"model": "tiny", "prompt": [5, 39], "prompt_logprobs": 2})
    assert "39" in raw[1]["choices"][0]["prompt_logprobs"][1]
    assert 39 not in connected(stub).top_k((5, 39), 2, "tiny").ids
    # A limit of the server names its flag.
    stub.most_logprobs = 20
    with pytest.raises(ServerError, match=r"greater than max allowed.* --max-logprobs 64"):
        connected(stub).top_k(TEXT, 64, "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places, _: places.pop(), "not about the text that was sent"),
        (lambda places, _: places[2].popitem(), "1 tokens came back .* of 2"),
        (lambda _, choice: choice.update(prompt_token_ids=[1]), "not about the text that was sent"),
        (lambda places, _: places.__setitem__(2, None), "not about the text that was sent"),
        (lambda places, _: places[2].update({"-5": {"logprob": -1.0}}), "than or equal to 0"),
        (lambda places, _: places[1]["8"].update(logprob=0.5), "no log-probabilities of one soft"),
    ],
)
def test_an_answer_about_something_else_is_refused(stub: Stub, change: Any, message: str):
    def spoiled(_: str, tree: Any) -> Any:
        (choice,) = tree["choices"]
        change(choice["prompt_logprobs"], choice)
        return tree

    stub.spoil = spoiled

    with pytest.raises(ServerError, match=message):
        connected(stub).top_k((5, 8, 11, 14), 2, "tiny")


class Other(Counting):
    """A model of other probabilities: the same order, less certain."""

    shift = 0.02

    def scores(self, prompt: list[int]) -> list[list[float]]:
        return [[value - self.shift for value in values] for values in super().scores(prompt)]


def test_replicas_may_differ_by_rounding_alone(pair):
    stub, other = pair
    other.model = Other()
    servers, needs = [connected(one) for one in pair], Requirements("tiny", 20, VOCABULARY)
    check_scores(servers, [TEXT], needs, 4)
    other.model.shift = 0.3
    with pytest.raises(ServerError, match=r"differ by 0\.300 .* at most 0\.05") as caught:
        check_scores(servers, [TEXT], needs, 4)
    assert stub.url in str(caught.value)
    assert other.url in str(caught.value)


def test_a_token_that_the_other_answer_lacks_counts_as_unlikely():
    one = BestTokens(np.array([[1, 2]], np.int32), np.array([[-0.1, -3.0]], np.float32))
    other = BestTokens(np.array([[1, 3]], np.int32), np.array([[-0.1, -2.5]], np.float32))

    assert difference(one, one) == 0
    assert difference(one, other) == pytest.approx(0.25)
