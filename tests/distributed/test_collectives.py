"""Collectives between ranks: errors, rows made once per node, limits, and tensors on the CPU."""

import re
from pathlib import Path

import pytest
from tiny_runs import config_tree, write_config, write_reviews

PROGRAM = Path(__file__).with_name("collective_ranks.py")


@pytest.mark.parametrize(
    ("kind", "failing"), [("together", 1), ("main_first", 0), ("main_first", 1)]
)
def test_an_error_of_one_rank_keeps_the_others_from_going_on(workers, kind, failing):
    said = workers(2).run("collective_cases.errors", kind, failing)

    assert said == [f"rank {failing} cannot read it"] * 2


def test_one_rank_of_a_node_makes_the_rows_and_the_others_map_its_files(workers, tmp_path):
    first, second = workers(2).run("collective_cases.rows_of_node", [str(tmp_path)] * 2)

    assert (first["ran"], second["ran"]) == ([0], [])
    assert first["rows"] == second["rows"] == [0, 20]
    assert second["files"] == first["files"]


@pytest.mark.parametrize("sees", [True, False])
def test_a_node_makes_rows_of_its_own_if_it_does_not_see_the_files_of_rank_0(
    workers, tmp_path, sees
):
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    case = "rows_of_node" if sees else "rows_of_separate_node"

    first, second = workers(2).run(f"collective_cases.{case}", places)

    assert (first["ran"], second["ran"]) == ([0], [] if sees else [1])
    assert (first["rows"], second["rows"]) == ([0, 20], [0, 20] if sees else [1, 20])


def test_an_output_folder_that_a_node_shows_late_is_waited_for(workers, tmp_path):
    said = workers(2).run("collective_cases.held_folder", [str(tmp_path)] * 2, 2)

    assert said[1].startswith("held")
    assert re.fullmatch(r"held; .* not visible yet as \S+ on \S+ \(node 1\): waiting", said[0])


def test_an_output_folder_that_a_node_does_not_share_ends_all_ranks(workers, tmp_path):
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]

    said = workers(2).run("collective_cases.held_folder", folders, 0)

    assert said[0] == said[1]
    assert re.search(rf"not visible as {folders[1]}/lock.json on \S+ \(node 1\); all", said[0])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_that_cannot_make_its_rows_ends_all_ranks(workers, tmp_path, failing):
    places = [str(tmp_path / "a"), str(tmp_path / "b")]

    found = workers(2).run("collective_cases.rows_of_separate_node", places, failing)

    assert [answer["said"] for answer in found] == [f"rank {failing} cannot read it"] * 2


def test_only_one_rank_of_a_node_reads_the_texts(workers, tmp_path):
    task = {"type": "classification", "dataset": str(write_reviews(tmp_path / "texts"))}
    config = write_config(tmp_path / "run.yaml", config_tree(tmp_path / "out", task))

    first, second = workers(2).run(
        "collective_cases.files_read", str(config), str(tmp_path / "texts")
    )

    assert first == ["train.jsonl", "validation.jsonl", "64"]
    assert second == ["64"]


def test_variables_that_a_launcher_has_not_passed_on_are_named(workers):
    first, second = workers(2).run("collective_cases.missing_variables", 1)

    (said,) = first
    assert "lacks variables that rank 0 has: HF_TEST, MEGAKD_CACHE_TEST; add lines" in said
    assert "secret" not in said
    assert second == first
    assert workers(2).run("collective_cases.missing_variables", 0) == [[], []]


def test_a_rank_that_waits_too_long_says_who_is_doing_what(launch):
    ranks = launch("late", program=PROGRAM)

    assert ranks.wait() == [0, 0], ranks.text
    assert "rank 1 has waited 2 s for the other ranks (train.collective_timeout)" in ranks.text
    assert "while training stage student; rank 0 was saving step 5, begun " in ranks.text


# Rank 0 may work for longer than the limit; a group of NCCL has no backend for the CPU.
@pytest.mark.parametrize("case", ["work", "accelerators"])
def test_ranks_wait_for_work_and_reduce_tensors_on_the_cpu(launch, case):
    ranks = launch(case, program=PROGRAM)

    assert ranks.wait() == [0, 0], ranks.text
