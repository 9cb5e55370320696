"""Write a finished stage as a Hugging Face folder, or as ONNX."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megakd.commands.arguments import Parser, add_config, config_of_arguments, named_folder, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.record import exported_stage
from megakd.process.terminal import print_aside


def add_options(parser: Parser) -> None:
    """Add the config, the stage, and the folder to write with its format."""
    add_config(parser)
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="the stage to export; default: the stage that final/ was copied from",
    )
    parser.add_argument("--to", metavar="FOLDER", type=named_folder, help="the folder to write to")
    parser.add_argument(
        "--format",
        choices=("transformers", "onnx"),
        default="transformers",
        help="onnx: a graph in place of the weights, compared with torch",
    )
    parser.add_argument(
        "--int8", action="store_true", help="with --format onnx: int8 weights in the graph"
    )


def run(arguments: argparse.Namespace) -> None:
    """Export the stage; print the folder, and how far a graph is from torch."""
    config = config_of_arguments(arguments)
    if arguments.to is None:
        raise ConfigError("--to is missing; give the folder to write the model to")
    if arguments.int8 and arguments.format != "onnx":
        raise ConfigError("--int8 needs --format onnx")
    # Before torch is imported, which takes seconds.
    exported_stage(config.output_dir, arguments.stage)
    add, of_graph = None, list[str]()
    with print_aside():
        if arguments.format == "onnx":
            add = _to_graph(config, of_graph, int8=arguments.int8)
        from megakd.run import finished_run

        finished_run.export_run(config, arguments.stage, arguments.to, add=add)
    say("\n".join([str(arguments.to), *of_graph]))


def _to_graph(config: RunConfig, lines: list[str], *, int8: bool) -> Callable[[Path], None]:
    from transformers.utils import logging

    from megakd.models.onnx import MODEL, check_packages, write_onnx

    check_packages("--format onnx")
    logging.disable_progress_bar()

    def add(folder: Path) -> None:
        whole = folder / ("whole" if int8 else MODEL)
        worst = write_onnx(folder, to=whole)
        which = "the fp32 graph" if int8 else "the graph"
        lines.append(f"{which}'s logits differ from torch's by at most {worst:.1e}")
        if int8:
            from megakd.commands.scored_models import int8_graph

            lines.extend(int8_graph(config, folder, whole))
            for path in folder.glob(f"{whole.name}*"):
                path.unlink()
        for path in folder.glob("*.safetensors*"):
            path.unlink()

    return add
