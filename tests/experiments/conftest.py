"""Puts the checkout last on the path, so that experiments are found and the packages are the installed ones."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
