"""Builds the extension modules. Whatever else packaging needs to know is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "netfilterqueue"
MODULES = (
    "_uapi",
    "_netns",
    "_signals",
    "_channel",
    "_outbox",
    "_checksums",
    "_changes",
    "_packet",
    "_handmade",
    "_receiver",
    "_impl",
    "_lowlevel",
    "_nflogdata",
    "_nflog",
)
HEADERS = (
    "Python.h",
    "linux/netfilter/nfnetlink_queue.h",
    "libmnl/libmnl.h",
    "libnetfilter_queue/libnetfilter_queue.h",
)
LIBRARIES = ("mnl", "netfilter_queue")
DIRECTIVES = {
    "language_level": 3,
    # Methods that check what they are called on: with Cython's own kind, `Packet.accept(None)`
    # would read memory that is no packet.
    "binding": False,
    # Signatures for help() and inspect, which such methods have none of otherwise.
    "embedsignature": True,
    "embedsignature.format": "clinic",
    "cdivision": True,  # C arithmetic on C integers; no hidden test for zero
    "auto_pickle": False,  # none of the types could be rebuilt from a pickle
    # Before 3.14 nothing tells whether an object that another thread may be ending is alive.
    "freethreading_compatible": sys.version_info >= (3, 14),
}
BUFFER_SIZES = range(4096, 1048576 + 1)

# Everything that a build needs, so that whoever lacks two things is told once.
PACKAGES = (
    "Debian, Ubuntu: apt install gcc libc6-dev python3-dev libmnl-dev libnetfilter-queue-dev; "
    "Fedora: dnf install gcc python3-devel libmnl-devel libnetfilter_queue-devel; "
    "Arch: pacman -S gcc python libmnl libnetfilter_queue; "
    "Alpine: apk add gcc musl-dev linux-headers python3-dev libmnl-dev libnetfilter_queue-dev"
)


def fail(message: str) -> SystemExit:
    # The only exception that reaches the user as the line that it is: with any other, setuptools
    # prints a traceback, and for an editable install a page of advice too.
    return SystemExit(f"error: {message}")


def macros_from_environment() -> list[tuple[str, str]]:
    macros = []
    size = os.environ.get("NETFILTERQUEUE_BUFFER_SIZE")
    if size is not None:
        if not size.isdecimal() or int(size) not in BUFFER_SIZES:
            raise fail(
                f"NETFILTERQUEUE_BUFFER_SIZE is {size!r}, but must be a number of bytes "
                f"from {BUFFER_SIZES[0]} to {BUFFER_SIZES[-1]}"
            )
        macros.append(("NETFILTERQUEUE_BUFFER_SIZE", str(int(size))))
    debug = os.environ.get("NETFILTERQUEUE_DEBUG", "0")
    if debug not in ("0", "1"):
        raise fail(f"NETFILTERQUEUE_DEBUG is {debug!r}, but must be 0 or 1")
    if debug == "1":
        macros.append(("NETFILTERQUEUE_DEBUG", "1"))
    return macros


def library_flags(option: str, default: list[str]) -> list[str]:
    """What pkg-config says, or the default where it, or its knowledge of a library, is missing."""
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), option]
    command += [f"lib{library}" for library in LIBRARIES]
    try:
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return default
    return shlex.split(result.stdout)


# setuptools' command derives from Cython's, whose options are the two that start with "cython_".
class BuildExtensions(build_ext):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.cython_directives = DIRECTIVES
        self.cython_c_in_temp = True

    def build_extensions(self) -> None:
        macros = macros_from_environment()
        compile_args = ["-pthread", *library_flags("--cflags", [])]
        link_args = ["-pthread", *library_flags("--libs", [f"-l{name}" for name in LIBRARIES])]
        self.check_prerequisites(compile_args, link_args)
        compile_args += self.flags_for_less_code()
        for extension in self.extensions:
            extension.define_macros = macros
            extension.extra_compile_args = compile_args
            extension.extra_link_args = link_args
            extension.depends = [str(path) for path in Path(PACKAGE).glob("*.pxd")]
        # Files that are newer than what they were built from are kept, unless built otherwise.
        settings = f"{macros} {compile_args} {link_args} {DIRECTIVES} Cython {version('Cython')} "
        settings += f"{self.compiler.compiler_so} {self.compiler.linker_so}\n"
        record = Path(self.build_temp, "settings.txt")
        if not record.is_file() or record.read_text() != settings:
            record.unlink(missing_ok=True)
            self.force = True
        super().build_extensions()
        record.write_text(settings)

    def check_prerequisites(self, compile_args: list[str], link_args: list[str]) -> None:
        """Say what is missing and where to get it before the compiler does in many more words."""
        if not self.can_build("", compile_args, []):
            raise fail(f"no C compiler that works ({self.compiler.compiler_so[0]}). {PACKAGES}")
        search = [argument for argument in link_args if argument.startswith("-L")]
        missing = [
            header
            for header in HEADERS
            if not self.can_build(f"#include <{header}>\n", compile_args, [])
        ]
        missing += [
            f"lib{library}"
            for library in LIBRARIES
            if not self.can_build("", compile_args, [*search, f"-l{library}"])
        ]
        if missing:
            raise fail(f"not found: {', '.join(missing)}. {PACKAGES}")

    def flags_for_less_code(self) -> list[str]:
        """When a packet comes after a while, little of the code that it needs is in the caches: the
        less there is of it the better. Who names a level of optimization in CFLAGS gets that."""
        flags = ["-fno-plt"]
        if "-O" not in os.environ.get("CFLAGS", ""):
            flags.append("-O2")  # Python's own modules are built with -O3, mostly
        return [flag for flag in flags if self.can_build("", [flag], [])]

    def can_build(self, text: str, compile_args: list[str], link_args: list[str]) -> bool:
        """Whether this C text becomes a shared object."""
        compile_args = [*(f"-I{path}" for path in self.include_dirs), *compile_args]
        link_args = [*(f"-L{path}" for path in self.library_dirs), *link_args]
        with tempfile.TemporaryDirectory() as directory:
            source, object_, shared = (
                f"{directory}/probe{suffix}" for suffix in (".c", ".o", ".so")
            )
            Path(source).write_text(text + "extern int probe;\nint probe;\n")
            commands = (
                [*self.compiler.compiler_so, *compile_args, "-c", source, "-o", object_],
                [*self.compiler.linker_so, object_, *link_args, "-o", shared],
            )
            try:
                for command in commands:
                    subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                return False
        return True


setup(
    ext_modules=[
        Extension(f"{PACKAGE}.{module}", [f"{PACKAGE}/{module}.pyx"]) for module in MODULES
    ],
    cmdclass={"build_ext": BuildExtensions},
)
