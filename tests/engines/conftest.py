from __future__ import annotations

import sys
from pathlib import Path

# the matrix of policies is one, for the policies themselves and for the engine that applies them
sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
