from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
# helpers of all tests lie beside the folders, whatever of them is collected and from where
sys.path.insert(0, str(_TESTS))
# the matrix of policies is one, for the policies themselves and for the engine that applies them
sys.path.insert(0, str(_TESTS / "compression"))
