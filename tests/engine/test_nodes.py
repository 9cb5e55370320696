"""Ranks of a node; `tests/distributed/test_nodes.py` shards over them."""

from __future__ import annotations

import socket

import pytest

from megakd.engine import nodes
from megakd.engine.collectives import node_name
from megakd.errors import ConfigError


def test_ranks_are_told_apart_by_the_names_of_their_nodes_in_any_order():
    assert nodes.ranks_by_node(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    assert nodes.ranks_by_node(["a", "b", "a", "b"]) == [[0, 2], [1, 3]]
    assert nodes.ranks_by_node(["a"]) == [[0]]


def test_nodes_with_different_numbers_of_ranks_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="on every node: a has 2, b has 1; start as many ranks"):
        nodes.ranks_by_node(["a", "b", "a"])


@pytest.mark.parametrize("variable", ["CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"])
def test_launchers_on_one_host_are_nodes_by_the_number_that_they_give(monkeypatch, variable):
    for name in ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    host = socket.gethostname()

    assert node_name() == host
    monkeypatch.setenv(variable, "1")
    assert node_name() == f"{host} (node 1)"
