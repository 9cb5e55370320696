"""Ranks: how they find each other, what they share, and what their log and errors say."""

import io
import logging
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest

from megakd.engine import collectives, distributed
from megakd.engine.collectives import activity, backend_for, node_name, progress, reports_lost_peer
from megakd.engine.distributed import remove_dead_locks
from megakd.errors import CollectiveTimeoutError, ConfigError, MegakdError, PeerLostError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """An environment without a launcher, put back afterwards."""
    slurm = [name for name in os.environ if name.startswith("SLURM_")]
    others = ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "GLOO_SOCKET_IFNAME")
    for name in (*PLACE, "LOCAL_WORLD_SIZE", "CROSS_RANK", "GROUP_RANK", *others, *slurm):
        monkeypatch.setenv(name, "")  # remembered, so that it is restored
        monkeypatch.delenv(name)


def test_one_process_without_a_launcher_is_its_own_group():
    distributed._complete_environment()

    assert [os.environ[name] for name in PLACE[:5]] == ["0", "1", "0", "1", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 0


def test_half_a_launcher_is_refused_naming_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(MegakdError, match="RANK is set without MASTER_ADDR, MASTER_PORT"):
        distributed._complete_environment()


def slurm_step(monkeypatch, **changes):
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_NODELIST": "node-1,node-2",
    }
    for name, value in (variables | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)


RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, ("3", "4", "1", "node-1", "20041")),
        # A batch script alone is no rank.
        ({"SLURM_STEP_ID": None}, (None,) * 5),
        # The rank of another launcher wins.
        ({"RANK": "7"}, ("7", None, None, None, None)),
    ],
)
def test_a_step_of_srun_gives_rank_and_meeting_point(monkeypatch, changes, place):
    slurm_step(monkeypatch, **changes)

    distributed.adopt_slurm_variables()

    assert tuple(map(os.environ.get, RANK)) == place


def test_two_steps_of_a_job_and_of_the_next_job_meet_at_ports_of_their_own(monkeypatch):
    ports = set()
    for job, step in ((41, 0), (41, 1), (42, 0), (42, 1)):
        slurm_step(monkeypatch, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))
        for name in ("RANK", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        distributed.adopt_slurm_variables()
        ports.add(os.environ["MASTER_PORT"])

    assert len(ports) == 4


def test_a_compressed_host_list_without_scontrol_says_what_to_set(monkeypatch, tmp_path):
    slurm_step(monkeypatch, SLURM_STEP_NODELIST="node-[1-2]")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MegakdError, match=r"SLURM_NODELIST='node-\[1-2\]'.*set MASTER_ADDR"):
        distributed.adopt_slurm_variables()


@pytest.mark.parametrize(
    ("error", "kind", "shown"),
    [
        (
            "[pair.cc:534] Connection closed by peer [127.0.0.1]:4711",
            PeerLostError,
            r"rank 3 on \S+ ends because another rank has ended while starting \(Conn.*\); see",
        ),
        (
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)",
            CollectiveTimeoutError,
            r"rank 3 on \S+ has waited longer than train\.collective_timeout .* while starting;",
        ),
        ("wrong shape", RuntimeError, "shape"),
    ],
)
def test_a_collective_whose_other_end_is_gone_is_one_line(monkeypatch, error, kind, shown):
    monkeypatch.setenv("RANK", "3")

    with pytest.raises(kind, match=shown), reports_lost_peer():
        raise RuntimeError(error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out "
            "connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:6536$1",
            "timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:6536$1",
        ),
        ("[enforce fail at /gloo/device.cc:84] ifa. Unable to find address for: eth7", "ifa. Un"),
    ],
)
def test_nodes_that_gloo_cannot_connect_are_one_line_that_names_the_interface(
    monkeypatch, error, reason
):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")

    with pytest.raises(PeerLostError) as raised, reports_lost_peer():
        raise RuntimeError(error)

    message = r"rank 3 on .* cannot connect .*\({}.*set GLOO_SOCKET_IFNAME \(eth7\) on every node"
    assert re.match(message.format(re.escape(reason)), str(raised.value))
    assert "\n" not in str(raised.value)


TASKS = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}
NODES = {
    "first node": (TASKS | {"SLURM_NODEID": "0"}, 4),
    "repeated": (TASKS | {"SLURM_NODEID": "1"}, 4),
    "last": (TASKS | {"SLURM_NODEID": "2"}, 3),
    "a number of the launcher wins": (TASKS | {"SLURM_NODEID": "0", "LOCAL_SIZE": "2"}, 2),
    "an older Slurm": ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
}


@pytest.mark.parametrize(("variables", "ranks"), NODES.values(), ids=NODES)
def test_a_step_of_srun_gives_the_ranks_of_each_node(monkeypatch, variables, ranks):
    slurm_step(monkeypatch, **variables)

    assert distributed._local_world() == ranks


def test_a_gpu_has_a_backend_of_its_own_and_one_for_the_cpu():
    assert backend_for("cuda", "nccl") == "cpu:gloo,cuda:nccl"
    assert backend_for("cpu", "gloo") == "gloo"


@pytest.fixture
def threads(monkeypatch):
    """Threads that a start sets, with 8 of the host's 64 cores allowed and 4 ranks."""
    collected = []
    monkeypatch.setattr(distributed.torch, "set_num_threads", collected.append)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(distributed.os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    return collected


CORES = {
    "shared by the ranks": ({}, [2]),
    "of the task of srun": ({"SLURM_CPUS_PER_TASK": "6"}, [6]),
    "of torchrun in a task": ({"SLURM_CPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "none"}, [2]),
    "of the user": ({"OMP_NUM_THREADS": "1"}, []),
    "of torchrun": ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, [2]),
}


@pytest.mark.parametrize(("variables", "set_to"), CORES.values(), ids=CORES)
def test_ranks_share_the_cores_unless_a_number_of_threads_is_set(
    threads, monkeypatch, variables, set_to
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    distributed._share_cores()

    assert threads == set_to


@pytest.mark.parametrize(
    ("device", "world", "bound"), [("cuda", 2, "cuda:1"), ("cuda", 1, None), ("cpu", 2, None)]
)
def test_a_rank_of_several_gpus_is_bound_to_its_own(monkeypatch, device, world, bound):
    given = {}
    store = distributed.dist.HashStore()
    store.set("megakd/attempt-0/started/1", "")
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, world)]))
    monkeypatch.setattr(distributed, "_set_timeout", lambda _: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda _, **kw: given.update(kw))
    monkeypatch.setenv("LOCAL_RANK", "1")

    distributed._join("gloo", device, timeout=timedelta(seconds=1))

    assert str(given["device_id"]) == str(bound)


def test_ranks_are_told_apart_by_the_names_of_their_nodes_in_any_order():
    assert distributed.ranks_by_node(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    assert distributed.ranks_by_node(["a", "b", "a", "b"]) == [[0, 2], [1, 3]]
    assert distributed.ranks_by_node(["a"]) == [[0]]


def test_nodes_with_different_numbers_of_ranks_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="on every node: a has 2, b has 1; start as many ranks"):
        distributed.ranks_by_node(["a", "b", "a"])


@pytest.mark.parametrize("variable", ["CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"])
def test_launchers_on_one_host_are_nodes_by_the_number_that_they_give(monkeypatch, variable):
    host = socket.gethostname()

    assert node_name() == host
    monkeypatch.setenv(variable, "1")
    assert node_name() == f"{host} (node 1)"


@pytest.fixture(autouse=True)
def _few_processes(monkeypatch):
    """Look at the processes of this test alone; a busy host has hundreds of others."""
    this = psutil.Process()
    monkeypatch.setattr(psutil, "process_iter", lambda: [this, *this.children()])


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (0, 0))  # of an earlier start
    return path


def test_a_lock_stays_as_long_as_another_process_holds_it_open(lock, tmp_path, caplog):
    program = "import sys; file = open(sys.argv[1], 'r+b'); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=pipe, stdout=pipe
    ) as other:
        other.stdout.readline()

        assert remove_dead_locks(tmp_path) == []
        assert lock.exists()
        other.communicate(b"\n")

    assert remove_dead_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert f"removed the lock {lock}" in caplog.text


def test_a_lock_that_is_younger_than_this_process_stays(lock, tmp_path):
    lock.touch()

    assert remove_dead_locks(tmp_path) == []
    assert lock.exists()


# The activity of a run: a line of the log each, and a name for an error of a collective.


def test_an_activity_is_one_line_of_the_log_and_what_is_part_of_it_none(caplog):
    caplog.set_level(logging.INFO, logger="megakd")

    with activity("training stage student"), activity("saving step 5 of stage student"):
        pass
    with pytest.raises(ValueError, match="row"), activity("reading the data"):
        raise ValueError("row")
    with activity("measuring latency"):
        pass

    assert [record.getMessage() for record in caplog.records] == [
        "training stage student",
        "reading the data",
        "measuring latency",
    ]


def test_an_error_of_a_collective_carries_the_innermost_activity_first():
    with pytest.raises(RuntimeError) as error, activity("training"), activity("saving step 5"):
        raise RuntimeError("timed out")

    assert error.value.__notes__ == ["saving step 5", "training"]


def test_a_long_activity_says_every_minute_how_far_it_is(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="megakd")
    minutes = iter(range(100))
    monkeypatch.setattr(collectives.time, "monotonic", lambda: 60.5 * next(minutes))
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.sys, "stderr", io.StringIO())

    with activity("scoring teacher"):
        # What is part of it tells nothing of its own.
        for _ in progress(range(3), total=2500, each=1000):
            assert [*progress(range(2), total=2)] == [0, 1]

    assert [record.getMessage() for record in caplog.records] == [
        "scoring teacher",
        "scoring teacher, 1,000 of 2,500 rows, about 2 min left",
        "scoring teacher, 2,000 of 2,500 rows, about 1 min left",
        "scoring teacher, 2,500 of 2,500 rows, about 0 min left",
    ]
