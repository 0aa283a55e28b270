"""Experiments lie in the checkout alone. It comes last, so that the packages are those that are installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
