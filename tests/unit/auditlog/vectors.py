"""Public vectors, which are not part of the project: tests that need them are skipped where they are absent."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MPCTF_VECTORS", Path(__file__).parents[3].parent / "shared" / "vectors"))
needed = pytest.mark.skipif(not FOLDER.exists(), reason="no public vectors here; MPCTF_VECTORS names their folder")
