"""Where things lie in the checkout."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PROGRAMS = ROOT / "tests" / "programs"
CONFIGS = ROOT / "training" / "configs"
