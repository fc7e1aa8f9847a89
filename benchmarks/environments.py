"""What the contestants run in: built when first needed, kept in a cache directory outside the tree.

A name in the cache ends with a digest of everything that the result depends on: a changed source
file, another Python or other compiler flags are built anew, and nothing stale is ever measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
CACHE = Path(
    os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "netfilterqueue-benchmarks"
)
CLASSIC = "NetfilterQueue==1.1.0"
NFLOGR = "nflogr==0.2.12"
# On later ones every message raises a SystemError.
PYTHONS_FOR_NFLOGR = ("3.9", "3.8", "3.7", "3.6")
PYTHON = platform.python_version()
# What `pip install` of the tree reads.
SOURCES = (
    "netfilterqueue",
    "LICENSE.txt",
    "MANIFEST.in",
    "README.rst",
    "pyproject.toml",
    "setup.py",
)
FLAGS = ("CC", "CFLAGS", "LDFLAGS", "NETFILTERQUEUE_BUFFER_SIZE", "NETFILTERQUEUE_DEBUG")


class CannotBuild(Exception):
    """Something that a contestant needs is missing; the text says what."""


def this_library() -> Path:
    """The interpreter of an environment that has the library of this tree."""
    files = {
        path.relative_to(TREE): path.read_bytes()
        for name in SOURCES
        for path in sorted(source_files(TREE / name))
    }

    def build(path: Path) -> None:
        # A build writes next to what it builds, so it builds a copy.
        with tempfile.TemporaryDirectory() as copy:
            for name, content in files.items():
                target = copy / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            make_environment(path, copy)

    parts = [part for name, content in files.items() for part in (bytes(name), content)]
    return built(f"this-{PYTHON}", [*python_parts(), *parts], build) / "bin" / "python"


def classic_library() -> Path:
    """The interpreter of an environment that has NetfilterQueue 1.1.0 from PyPI."""
    parts = [*python_parts(), CLASSIC.encode()]
    path = built(f"classic-{PYTHON}", parts, lambda path: make_environment(path, CLASSIC))
    return path / "bin" / "python"


def nflogr() -> Path:
    """The interpreter of an environment that has nflogr from PyPI: an old Python's."""
    python = python_for_nflogr()
    parts = [python.encode(), NFLOGR.encode()]
    path = built("nflogr", parts, lambda path: make_environment(path, NFLOGR, python))
    return path / "bin" / "python"


def python_for_nflogr() -> str:
    for version in PYTHONS_FOR_NFLOGR:
        managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
        for candidate in (f"python{version}", *map(str, managed)):
            # A version manager's stand-in for a Python that is not there fails: it is none.
            with contextlib.suppress(CannotBuild):
                run([candidate, "-c", ""])
                return candidate
    raise CannotBuild(f"{NFLOGR} takes Python 3.9 or earlier, and there is none")


def c_program(name: str) -> Path:
    """A C program of this directory, compiled."""
    source, header = HERE / f"{name}.c", HERE / "loop.h"
    compiler = os.environ.get("CC", "cc")

    def build(path: Path) -> None:
        run([compiler, "-O2", "-o", path, source, "-lmnl"])

    return built(name, [compiler.encode(), source.read_bytes(), header.read_bytes()], build)


def source_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for suffix in (".py", ".pyi", ".pyx", ".pxd", ".typed"):
            yield from path.rglob(f"*{suffix}")
    elif path.exists():
        yield path


def python_parts() -> list[bytes]:
    flags = [f"{name}={os.environ.get(name)}".encode() for name in FLAGS]
    return [sys.version.encode(), sys.base_prefix.encode(), *flags]


def built(name: str, parts: list[bytes], build: Callable[[Path], None]) -> Path:
    """The path in the cache that these parts determine, built first if it is not there.

    What was built moves to its place as a whole, so that an interrupted build leaves nothing
    behind that looks complete. Its predecessor goes.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    path = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if not path.exists():
        print(f"building {path}", file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            new = Path(directory, "new")
            build(new)
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            new.rename(path)
    return path


def make_environment(path: Path, requirement: str, python: str = sys.executable) -> None:
    try:
        run([python, "-m", "venv", path])
    except CannotBuild as error:
        raise CannotBuild(f"{error}\nDebian keeps the module venv in python3-venv.") from None
    # pip's cache does not know with which compiler flags a wheel was made.
    run([path / "bin" / "python", "-m", "pip", "install", "--no-cache-dir", requirement])


def run(command: list[str | Path]) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
    except FileNotFoundError:
        raise CannotBuild(f"{command[0]}: no such program") from None
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, command))
        raise CannotBuild(f"{error.output}\n{words} failed ({error.returncode})") from None
