"""What a person types: ``python -m anyflash doctor | rows | bench | demo``.

Each command is one module with two functions: ``add_arguments(parser)`` and ``run(arguments)``,
which returns the exit code: 0 done, 1 something does not work, 2 asked wrongly. Nothing here is
imported by ``import anyflash``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyflash.cli.console import UserError

COMMANDS = {
    "doctor": "what this machine has, a self-test, and what to do about what is missing",
    "rows": "the kernels of this package, with the resources that each one uses",
    "bench": "speed and memory against the standard attention and torch's",
    "demo": "search a text with a real pretrained encoder whose attention is anyflash",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; mistakes of the user end in one line, not
    in a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser(arguments)
    try:
        parsed = parser.parse_args(arguments)
        if parsed.version:
            print(f"anyflash {_version()}")
            return 0
        if parsed.cmake_dir:
            print(cmake_dir())
            return 0
        if parsed.command is None:
            parser.print_help()
            return 0
        code = int(commands[parsed.command].run(parsed))
        sys.stdout.flush()  # a reader that has gone shows here
        return code
    except SystemExit as end:  # argparse: --help, or a wrong option
        return int(end.code or 0)
    except UserError as error:
        print(f"anyflash: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nanyflash: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def cmake_dir() -> Path:
    """The folder for CMake's ``anyflash_DIR``, the one that holds anyflash-config.cmake."""
    from anyflash.cli.facts import package_folder

    folder = package_folder() / "lib" / "cmake" / "anyflash"
    if not (folder / "anyflash-config.cmake").is_file():
        text = f"no CMake package at {folder}: install anyflash with `pip install .`"
        raise UserError(text, exit_code=1)
    return folder


def _parser(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the module of the one command that the arguments name: the others stay
    unloaded."""
    parser = argparse.ArgumentParser(
        prog="python -m anyflash",
        description="Exact attention, tile by tile, on any CPU and on NVIDIA GPUs.",
        epilog="`python -m anyflash COMMAND --help` shows a command's options.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument(
        "--cmake-dir",
        action="store_true",
        help="print the folder of the CMake package, for anyflash_DIR",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    named = next((argument for argument in arguments if argument in COMMANDS), None)
    modules = {}
    for command, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            command, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if command == named:
            modules[command] = importlib.import_module(f"anyflash.cli.{command}")
            modules[command].add_arguments(subparser)
    return parser, modules


def _version() -> str:
    import anyflash

    return str(anyflash.__version__)
