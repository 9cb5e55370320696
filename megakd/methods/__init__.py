"""The methods, one file or folder each: options derived from `MethodOptions`, `run(config, lab)`.

A file is imported when its method is named, without further registration. A method may have
`BASELINES`, a mapping from names to functions `build(config, lab, student)`. Such a function
returns the stage of a model that has the student's shape and is trained differently.
"""

from __future__ import annotations

from megakd.config.options import MethodOptions, file_of
from megakd.stage import StageResult
from megakd.training.lab import Lab


def run_method(config: MethodOptions, lab: Lab) -> StageResult:
    """Run a method in a lab: call `run` of the file that defines the method's options."""
    return file_of(config).run(config, lab)
