"""Fields of a server's JSON, checked for presence and type."""

from __future__ import annotations

from typing import Any, TypeVar

from megakd.errors import ServerError

T = TypeVar("T")


def field_of(tree: Any, key: str, kind: type[T], where: str) -> T:
    """Return a field of a JSON object.

    Args:
        tree: the JSON.
        key: name of the field.
        kind: type of the value.
        where: address of the server, for the message.

    Raises:
        ServerError: `tree` is no object, or the field is missing or of another type.
    """
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, kind):
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ServerError(
            f"{where}: the answer has no {kind.__name__} named {key} (found: {found}); check "
            "rollout.server.kind and the version of the server"
        )
    return value


def numbers_of(tree: Any, key: str, where: str) -> tuple[int, ...]:
    """Return a field that holds token numbers.

    Raises:
        ServerError: the field is missing, or holds something else.
    """
    values = field_of(tree, key, list, where)
    wrong = next((value for value in values if type(value) is not int), None)
    if wrong is not None:
        raise ServerError(f"{where}: {key} holds {wrong!r}, which is no token number")
    return tuple(values)
