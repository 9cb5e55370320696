"""The methods, one file or folder each: options derived from `MethodOptions`, `run(config, lab)`.

Every file here with a function `run` is a method, without further registration. A method may have
`BASELINES`, a mapping from names to functions `build(config, lab, student)`. Such a function
returns the stage of a model that has the student's shape and is trained differently.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_type_hints

from pydantic import Discriminator, Field, Tag

from megakd.contract.lab import Lab
from megakd.contract.options import MethodOptions, wrong_method
from megakd.contract.plugins import OURS, THEIRS, FromPackage
from megakd.contract.stage import StageResult


def _options() -> tuple[type[MethodOptions], ...]:
    """Return the options classes of all methods of this folder, in the order of the files."""
    files = (
        importlib.import_module(f"{__name__}.{f.name}") for f in pkgutil.iter_modules(__path__)
    )
    return tuple(
        kind
        for file in files
        if hasattr(file, "run")
        for kind in vars(file).values()
        if getattr(kind, "__module__", None) == file.__name__ and wrong_method(kind) is None
    )


if TYPE_CHECKING:
    MethodConfig = MethodOptions
    PLUGIN_METHOD: FromPackage
else:
    OwnMethod = Annotated[Union[_options()], Field(discriminator="name")]  # noqa: UP007 - made here
    PLUGIN_METHOD = FromPackage("name", wrong_method)
    MethodConfig = Annotated[
        Annotated[OwnMethod, Tag(OURS)] | Annotated[MethodOptions, PLUGIN_METHOD, Tag(THEIRS)],
        Discriminator(PLUGIN_METHOD.branch),
    ]


def run_method(config: MethodOptions, lab: Lab) -> StageResult:
    """Run a method in a lab: call `run` of the file that defines the method's options."""
    return file_of(config).run(config, lab)


def file_of(config: MethodOptions) -> Any:
    """Return the module with a method's options, `run` and `BASELINES`."""
    return sys.modules[type(config).__module__]


def methods_with(flag: str) -> list[str]:
    """Return the names of the methods whose options set a class variable of `MethodOptions`."""
    return [get_args(get_type_hints(kind)["name"])[0] for kind in _options() if getattr(kind, flag)]


def baselines_of(config: MethodOptions) -> tuple[str, ...]:
    """Return the baselines that a run of a method may list; all methods have `alone`."""
    return ("alone", *getattr(file_of(config), "BASELINES", {}))
