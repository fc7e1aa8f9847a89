"""What is built from the sources, with which settings, and what whoever lacks something is told."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import netfilterqueue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds
BUILD_VARIABLES = {"CC", "CFLAGS", "LDFLAGS", "LDSHARED", "PKG_CONFIG"}

PACKAGES = {
    "apt": "gcc libc6-dev python3-dev libmnl-dev libnetfilter-queue-dev",
    "dnf": "gcc python3-devel libmnl-devel libnetfilter_queue-devel",
    "pacman": "gcc python libmnl libnetfilter_queue",
    "apk": "gcc musl-dev linux-headers python3-dev libmnl-dev libnetfilter_queue-dev",
}

# What the compiler is given where it looks for the thing that is missing here.
MISSING = {
    "Python.h": "<Python.h>",
    "linux/netfilter/nfnetlink_queue.h": "<linux/netfilter/nfnetlink_queue.h>",
    "libmnl/libmnl.h": "<libmnl/libmnl.h>",
    "libnetfilter_queue/libnetfilter_queue.h": "<libnetfilter_queue/libnetfilter_queue.h>",
    "libmnl": "-lmnl",
    "libnetfilter_queue": "-lnetfilter_queue",
}
COMPILER_WITHOUT = """\
#!/bin/sh
for argument; do
    case $argument in
        *.c) ! grep -qF -e '{missing}' "$argument" || exit 1 ;;
        '{missing}') exit 1 ;;
    esac
done
exec cc "$@"
"""


def build(*arguments: object, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a builder does who has set these variables and no other that a build heeds."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in BUILD_VARIABLES and not name.startswith("NETFILTERQUEUE_")
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "CFLAGS": "-O0", **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def refusal(directory: Path, **settings: str) -> str:
    """The line with which the build ends, before it has built anything."""
    built = directory / "built"
    command = ("setup.py", "-q", "build_ext", f"--build-temp={built}", f"--build-lib={built}")
    result = build(*command, cwd=ROOT, **settings)
    assert result.returncode == 1
    assert not built.exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made from a copy of this checkout without what git ignores."""
    directory = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(
        ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*cache", ".venv"
    )
    shutil.copytree(ROOT, directory / "checkout", ignore=ignored)
    backend = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    result = build("-c", backend, directory, cwd=directory / "checkout")
    assert result.returncode == 0, result.stderr
    (path,) = directory.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """A wheel of the source distribution, with a buffer size of its own and without pkg-config."""
    result = build(
        *("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", sdist.parent, sdist),
        cwd=sdist.parent,
        NETFILTERQUEUE_BUFFER_SIZE="8192",
        PKG_CONFIG="/nowhere/pkg-config",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = sdist.parent.glob("*.whl")
    return path


def files_of_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    return {str(name.relative_to(name.parts[0])) for name in names}


class TestVersion:
    def test_it_is_that_of_the_installed_distribution(self) -> None:
        assert netfilterqueue.__version__ == importlib.metadata.version("NetfilterQueue")

    def test_the_tuple_holds_the_numbers_of_the_text(self) -> None:
        assert netfilterqueue.__version__.startswith(".".join(map(str, netfilterqueue.VERSION)))
        assert len(netfilterqueue.VERSION) == 3

    def test_it_is_written_in_one_file_only(self) -> None:
        assert "version" not in pyproject()["project"]
        code = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("netfilterqueue/*.p*")]
        text = f'"{netfilterqueue.__version__}"'
        holders = [path.name for path in code if text in path.read_text(encoding="utf-8")]
        assert holders == ["_version.py"]

    def test_sdist_and_wheel_are_named_by_it(self, sdist: Path, wheel: Path) -> None:
        assert sdist.name == f"netfilterqueue-{netfilterqueue.__version__}.tar.gz"
        assert wheel.name.startswith(f"netfilterqueue-{netfilterqueue.__version__}-cp")


class TestSettings:
    @pytest.mark.parametrize("size", ["", "big", "64k", "-70000", "7e4", "4095", "1048577"])
    def test_a_bad_buffer_size_is_refused_in_one_line(self, tmp_path: Path, size: str) -> None:
        assert refusal(tmp_path, NETFILTERQUEUE_BUFFER_SIZE=size) == (
            f"error: NETFILTERQUEUE_BUFFER_SIZE is {size!r}, but must be a number of bytes"
            " from 4096 to 1048576"
        )

    @pytest.mark.parametrize("debug", ["", "yes", "true", "2"])
    def test_a_bad_debug_setting_is_refused_in_one_line(self, tmp_path: Path, debug: str) -> None:
        assert refusal(tmp_path, NETFILTERQUEUE_DEBUG=debug) == (
            f"error: NETFILTERQUEUE_DEBUG is {debug!r}, but must be 0 or 1"
        )

    def test_the_buffer_size_of_the_build_is_that_of_the_library(
        self, wheel: Path, tmp_path: Path
    ) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
        program = (
            "import netfilterqueue; print(netfilterqueue.__file__, netfilterqueue.BUFFER_SIZE)"
        )
        result = build("-c", program, cwd=tmp_path)
        assert result.stdout.split() == [f"{tmp_path}/netfilterqueue/__init__.py", "8192"]

    def test_another_setting_builds_anew_and_the_same_does_not(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "setup.py", tmp_path)
        package = tmp_path / "netfilterqueue"
        package.mkdir()
        (package / "__init__.py").touch()
        for path in ROOT.glob("netfilterqueue/*.pyx"):
            (package / path.name).touch()

        def times_of_build(**settings: str) -> list[int]:
            result = build("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, **settings)
            assert result.returncode == 0, result.stderr
            return [path.stat().st_mtime_ns for path in sorted(package.glob("*.so"))]

        plain = times_of_build()
        assert times_of_build() == plain
        debugging = times_of_build(NETFILTERQUEUE_DEBUG="1")
        assert not set(debugging) & set(plain)
        assert len(debugging) == len(plain) == len(list(package.glob("*.pyx")))


class TestPrerequisites:
    @pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
    def test_a_missing_compiler_is_told_in_one_line(self, tmp_path: Path, compiler: str) -> None:
        line = refusal(tmp_path, CC=compiler)
        assert line.startswith(f"error: no C compiler that works ({compiler}). ")
        self.check_packages(line)

    @pytest.mark.parametrize("name", MISSING)
    def test_a_missing_header_or_library_is_told_in_one_line(
        self, tmp_path: Path, name: str
    ) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text(COMPILER_WITHOUT.format(missing=MISSING[name]))
        compiler.chmod(0o755)
        line = refusal(tmp_path, CC=str(compiler))
        assert line.startswith(f"error: not found: {name}. ")
        self.check_packages(line)

    def test_an_empty_search_path_is_told_as_a_missing_compiler(self, tmp_path: Path) -> None:
        line = refusal(tmp_path, PATH=str(tmp_path))
        assert line.startswith("error: no C compiler that works ")
        self.check_packages(line)

    def test_pip_shows_the_line_and_no_traceback(self, sdist: Path) -> None:
        result = build(
            *("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", sdist),
            cwd=sdist.parent,
            CC="false",
        )
        assert result.returncode != 0
        output = result.stdout + result.stderr
        assert output.count("error: no C compiler that works (false). ") == 1
        assert "Traceback" not in output

    @staticmethod
    def check_packages(line: str) -> None:
        for manager, packages in PACKAGES.items():
            command = line.partition(f": {manager} ")[2].partition(";")[0]
            assert command.endswith(f" {packages}")


class TestContents:
    def test_the_sdist_holds_the_sources_and_nothing_generated(self, sdist: Path) -> None:
        files = files_of_sdist(sdist)
        package = {path for path in files if path.startswith("netfilterqueue/")}
        sources = {
            f"netfilterqueue/{path.name}"
            for path in (ROOT / "netfilterqueue").iterdir()
            if path.suffix in {".py", ".pyi", ".pyx", ".pxd", ".typed"}
        }
        assert package == sources
        assert {"LICENSE.txt", "README.rst", "ci/test", "tests/conftest.py"} <= files

    def test_the_wheel_holds_the_modules_and_the_types(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = {PurePosixPath(name) for name in archive.namelist()}
        package = {path.name for path in names if path.parts[0] == "netfilterqueue"}
        assert {"__init__.py", "__init__.pyi", "py.typed", "_version.py"} <= package
        extensions = {name.partition(".")[0] for name in package if name.endswith(".so")}
        assert extensions == {path.stem for path in ROOT.glob("netfilterqueue/*.pyx")}
        assert not [name for name in package if name.endswith((".c", ".pxd", ".pyx"))]

    def test_the_metadata_name_licence_and_no_dependency(self) -> None:
        metadata = importlib.metadata.metadata("NetfilterQueue")
        assert metadata["License-Expression"] == "MIT"
        assert metadata["Requires-Python"] == ">=3.9"
        assert metadata.get_all("Requires-Dist") is None

    def test_the_dependency_group_for_building_is_what_a_build_requires(self) -> None:
        configuration = pyproject()
        required = configuration["build-system"]["requires"]
        assert configuration["dependency-groups"]["build"] == required
