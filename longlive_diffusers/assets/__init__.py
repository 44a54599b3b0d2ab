"""Files that come with the package: a tiny pipeline, so that everything can be tried without a download or a GPU."""

from importlib.resources import files
from pathlib import Path


def toy_pipeline_path() -> Path:
    """The folder of the tiny pipeline, for `DiffusionPipeline.from_pretrained`; its README.md says what it is."""
    return Path(str(files(__name__) / "toy"))
