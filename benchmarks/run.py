"""The command line; `python3 benchmarks` starts it in the environment of this library."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import drain
import environments
import idle
import latency
import loops
import lowlevel
import mangle
import nflog
import stopping
import tcp
import workers
from arena import ContestError
from contest import Contestant, Result, positive
from netfilterqueue.testing import SandboxUnavailable

BENCHMARKS = (drain, mangle, tcp, latency, idle, loops, lowlevel, nflog, stopping, workers)
CONTESTANTS = ("this", "classic", "c")


def contestant(key: str, under: list[str]) -> Contestant:
    # Isolated: no variable of the user may put another library in the place of the one measured.
    script = ("-I", str(environments.HERE / "classic_api.py"))
    if key == "this":
        label, command = "this library", [sys.executable, *script]
    elif key == "classic":
        label, command = "NetfilterQueue 1.1.0", [str(environments.classic_library()), *script]
    else:
        label, command = "C loop", [str(environments.c_program("drain_loop"))]
    return Contestant(key, label, (*under, *command))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 benchmarks", description="Measures this library against others."
    )
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for module in BENCHMARKS:
        description = module.__doc__ or ""
        command = commands.add_parser(
            module.__name__,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_common_options(command)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser.parse_args()


def add_common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="who takes part")
    add("--under", type=shlex.split, default=[], metavar="COMMAND", help="such as 'perf record'")
    add("--rounds", type=positive, help="how often everybody's turn comes (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write every figure to a file")
    add("--rst", action="store_true", help="print the table as reStructuredText")
    add("--check", action="store_true", help="exit with status 1 if a target is not met")


def machine() -> str:
    return (
        f"Python {platform.python_version()}, Linux {platform.release()}, "
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> int:
    options = parse_arguments()
    about = machine()
    try:
        contestants = [contestant(key, options.under) for key in options.only]
        result: Result = options.run(options, contestants)
    except (ContestError, SandboxUnavailable, environments.CannotBuild) as error:
        sys.exit(f"benchmarks: {error}")
    result.notes.insert(0, about)
    print(result.rst() if options.rst else result.text())
    if options.json:
        options.json.write_text(json.dumps(result.json(), indent=2) + "\n")
    return int(options.check and not all(target.met for target in result.targets))


if __name__ == "__main__":
    sys.exit(main())
