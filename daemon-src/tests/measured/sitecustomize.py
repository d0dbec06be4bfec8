"""Measures coverage in every Python that finds this directory first on its path: the tests', and all their daemons.

Only for the lane daemon_plain, which sets COVERAGE_PROCESS_START. What a process has covered is written when it ends
by itself; what was killed has covered nothing.
"""

import sys
from pathlib import Path

import coverage

coverage.process_startup()

# Python runs one file of this name, and some tests have one of their own further down the path.
for other in (Path(directory, "sitecustomize.py") for directory in sys.path):
    if other.is_file() and not other.samefile(__file__):
        exec(compile(other.read_text(), other, "exec"), {"__name__": __name__, "__file__": str(other)})
        break
