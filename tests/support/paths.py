"""Where things lie in the checkout."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
WEIGHTS = ROOT / "tests" / "support" / "weights"  # drawn once: releases of libraries draw them in other orders
PROGRAMS = ROOT / "tests" / "programs"
IMPORTED_BY_SCRIPTS = ("training", "training/toy")  # below ROOT: where a script finds what it imports
CONFIGS = ROOT / "training" / "configs"
