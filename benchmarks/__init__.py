"""Benchmarks the operations from the checkout: `make bench`, `python -m benchmarks.run NAME`, `benchmarks.report`.

They share the hard cases and the accuracy rule with the tests (tests/support).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
