"""Measures this library against NetfilterQueue 1.1.0 and against what C can do.

    python3 benchmarks drain
    python3 benchmarks drain --help

It measures with the Python that runs it. What else it takes is built when first needed.
"""

from __future__ import annotations

import os
import sys

import environments

# The sandbox of the contests is a part of the library, so they are run where it is installed.
try:
    python = str(environments.this_library())
except environments.CannotBuild as error:
    sys.exit(str(error))
os.execv(python, [python, "-E", str(environments.HERE / "run.py"), *sys.argv[1:]])
