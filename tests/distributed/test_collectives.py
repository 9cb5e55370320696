"""Collectives between ranks: errors, rows made once per node, limits, and tensors on the CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_runs import review_task, run_in, write_reviews

from megakd.config.file import load_config
from megakd.engine import collectives, distributed
from megakd.errors import ConfigError, DataError, MegakdError
from megakd.run import holder
from megakd.run.main import check_same_everywhere
from megakd.training.inputs import prepare


def errors(kind: str, failing: int) -> str:
    """One rank alone fails inside a collective; every rank must learn of it instead of waiting."""

    def action():
        if distributed.ranks().rank == failing:
            raise DataError(f"rank {failing} cannot read it")
        return "went on"

    try:
        return getattr(collectives, kind)(action)
    except DataError as error:
        return str(error)


def rows_of_node(
    folders: list[str], failing: int | None = None, place: str | None = None
) -> dict[str, object]:
    """Make rows once per node, in this rank's folder."""
    rank = distributed.ranks().rank
    ran = []

    def action() -> Dataset:
        ran.append(rank)
        if rank == failing:
            raise DataError(f"rank {rank} cannot read it")
        path = Path(folders[rank]) / "rows"
        Dataset.from_dict({"number": [rank, 10, 20]}).save_to_disk(str(path))
        return Dataset.load_from_disk(str(path)).select([0, 2])

    try:
        rows = collectives.once_per_node(action, place=place or folders[rank])
    except DataError as error:
        return {"ran": ran, "said": str(error)}
    files = [entry["filename"] for entry in rows.cache_files]
    return {"ran": ran, "rows": list(rows["number"]), "files": files}


def another(config_path: str, what: str) -> str:
    """Return the error if rank 1 has another config, another version or other data."""
    other = distributed.ranks().rank == 1
    config = load_config(Path(config_path), ["seed=7"] if other and what == "config" else [])
    with pytest.MonkeyPatch.context() as patch:
        if other and what == "version":
            patch.setattr("megakd.run.main.installed_versions", lambda: {"torch": "another"})
        try:
            check_same_everywhere(config)
            if what == "data":  # on a disk of its own
                patch.setenv("GROUP_RANK", str(distributed.ranks().rank))
                patch.setattr(collectives, "_can_open", lambda _: False)
            if other and what == "data":
                words = [f"task.dataset={config.task.dataset}-of-another-node"]
                config = load_config(Path(config_path), words)
            prepare(config)
        except MegakdError as error:
            return str(error)
    return ""


def rows_of_separate_node(folders: list[str], failing: int | None = None) -> dict[str, object]:
    """Do as `rows_of_node`; no rank sees the disk of another node, and all hosts have one name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUP_RANK", str(distributed.ranks().rank))
        patch.setattr(collectives, "_can_open", lambda _: False)
        return rows_of_node(folders, failing, place="cache")


def held_folder(folders: list[str]) -> str:
    """Hold this rank's folder, of a node of its own."""
    rank = distributed.ranks().rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUP_RANK", str(rank))
        patch.setattr(holder, "VISIBLE_WITHIN_S", 2)
        try:
            with holder.locked_on_main(Path(folders[rank])):
                return "held"
        except ConfigError as error:
            return str(error)


def files_read(config_path: str, folder: str) -> list[str]:
    """Prepare the inputs of a run, and return the files below a folder that this rank has read."""
    collected: list[str] = []
    listening = [True]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open" and str(arguments[0]).startswith(folder):
            collected.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)  # cannot be removed
    try:
        rows = prepare(load_config(Path(config_path))).encoded.train
    finally:
        listening.clear()
    return [*sorted(set(collected)), str(len(rows))]


PROGRAM = Path(__file__).with_name("collective_ranks.py")


@pytest.mark.parametrize(
    ("kind", "failing"), [("raise_on_all", 1), ("main_first", 0), ("main_first", 1)]
)
def test_an_error_of_one_rank_keeps_the_others_from_going_on(workers, kind, failing):
    first, second = workers(2).run("test_collectives.errors", kind, failing)

    # Of another rank than the first, the message names the rank and its machine.
    assert re.fullmatch(rf"(rank 1 on .*: )?rank {failing} cannot read it", first)
    assert first.startswith("rank 1 on ") == (failing == 1)
    assert second == first


@pytest.fixture
def places(tmp_path) -> list[str]:
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("sees", [True, False])
def test_a_node_maps_the_files_of_rank_0_or_makes_rows_of_its_own_if_it_does_not_see_them(
    workers, places, sees
):
    case = "rows_of_node" if sees else "rows_of_separate_node"

    first, second = workers(2).run(f"test_collectives.{case}", places)

    assert (first["ran"], second["ran"]) == ([0], [] if sees else [1])
    assert (first["rows"], second["rows"]) == ([0, 20], [0, 20] if sees else [1, 20])
    assert (second["files"] == first["files"]) is sees


def test_an_output_folder_that_a_node_does_not_share_ends_all_ranks(workers, places, tmp_path):
    shared = workers(2).run("test_collectives.held_folder", [str(tmp_path / "shared")] * 2)
    first, second = workers(2).run("test_collectives.held_folder", places)

    assert shared == ["held", "held"]
    assert first == second
    assert re.search(rf"not visible as {places[1]}/lock.json on \S+ \(node 1\); all", first)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_that_cannot_make_its_rows_ends_all_ranks(workers, places, failing):
    result = workers(2).run("test_collectives.rows_of_separate_node", places, failing)

    assert all(answer["said"].endswith(f"rank {failing} cannot read it") for answer in result)


def test_only_one_rank_of_a_node_reads_the_texts(workers, tmp_path):
    config = run_in(tmp_path, review_task(tmp_path))

    first, second = workers(2).run(
        "test_collectives.files_read", str(config), str(tmp_path / "reviews")
    )

    assert first == ["train.jsonl", "validation.jsonl", "64"]
    assert second == ["64"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", r"has another config or version than rank 0 on \S+ \(seed: 42 there, 7 here"),
        ("version", r"\(megakd: '\S+' there, absent here; torch: '\S+' there, 'another' here"),
        ("data", r"^rank 1 on .* \(node 1\) reads other data than rank 0 on "),
    ],
)
def test_a_rank_with_another_config_version_or_data_ends_all_ranks(
    workers, tmp_path, what, message
):
    config = run_in(tmp_path, review_task(tmp_path))
    write_reviews(tmp_path / "reviews-of-another-node", train=50)

    first, second = workers(2).run("test_collectives.another", str(config), what)

    assert re.search(message, first)
    assert second == first


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_ends_the_other_with_one_line(launch, lost):
    ranks = launch("killed", str(lost), program=PROGRAM)

    assert sorted(ranks.wait()) == [-9, 1], ranks.text
    (line,) = [line for line in ranks.text.splitlines() if line]
    assert re.match(rf"rank {1 - lost} on \S+ ends because another rank has ended while ", line)


def test_a_rank_that_waits_too_long_says_what_it_was_doing(launch):
    ranks = launch("late", program=PROGRAM)

    assert ranks.wait() == [0, 0], ranks.text
    assert re.search(r"rank 1 on .* has waited longer than train\.collective_timeout", ranks.text)
    assert "while training stage student; see their output, or raise" in ranks.text


# Rank 0 may work for longer than the limit; a group of NCCL has no backend for the CPU.
@pytest.mark.parametrize("case", ["work", "accelerators"])
def test_ranks_wait_for_work_and_reduce_tensors_on_the_cpu(launch, case):
    ranks = launch(case, program=PROGRAM)

    assert ranks.wait() == [0, 0], ranks.text
