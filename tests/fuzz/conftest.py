"""The targets, which the fuzzer and the tests share; they lie in a package of this folder's own."""

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
