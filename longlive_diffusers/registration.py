"""Let stock diffusers find our classes.

diffusers has no entry points. It resolves a pipeline by `getattr(diffusers, class_name)`, and a component by the
library that `model_index.json` names, if that library is in `LOADABLE_CLASSES`; the library must then also expose the
base classes that its classes derive from. Registering is idempotent, and reads no file.
"""

import diffusers
from diffusers.pipelines import pipeline_loading_utils


LIBRARY = "longlive_diffusers"


def register(classes: dict[str, type]) -> None:
    """Make `classes` (by name) loadable with `DiffusionPipeline` and `AutoModel`, from disk and from the Hub."""
    for name, cls in classes.items():
        setattr(diffusers, name, cls)
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_loading_utils.LOADABLE_CLASSES[LIBRARY] = {"ModelMixin": methods, "SchedulerMixin": methods}
