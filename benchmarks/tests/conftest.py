# SPDX-License-Identifier: Apache-2.0
"""benchlib is no installed package, it lies beside the commands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
