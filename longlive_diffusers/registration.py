"""Let stock diffusers find our classes, without importing either before it is needed.

diffusers has no entry points. It resolves a pipeline by `getattr(diffusers, class_name)`; a component by the library
that `model_index.json` names, if that library is in `LOADABLE_CLASSES` (the library must then also expose the base
classes that its classes derive from); and a quantizer by the name of its method. Each of these is supplied when the
module of diffusers that holds it has been imported, which may be before `import longlive_diffusers` or after.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


LIBRARY = "longlive_diffusers"
CLASSES = ("LongLivePipeline", "LongLiveTransformer3DModel", "LongLiveScheduler", "TinyVideoDecoder")
QUANTIZER = f"{LIBRARY}.nvfp4.quantizer"


def register() -> None:
    """Make our classes loadable with `DiffusionPipeline`, `AutoModel` and `PipelineQuantizationConfig`; idempotent."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, supply in _SUPPLIES.items():
        if name in sys.modules:
            supply(sys.modules[name])


def _supply_classes(diffusers: ModuleType) -> None:
    """Let `getattr(diffusers, name)` find our classes; importing them here would import them half-way through."""

    def our_class(name: str) -> Any:
        if name not in CLASSES:
            raise AttributeError(f"module {diffusers.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(LIBRARY), name)

    diffusers.__dict__["__getattr__"] = our_class  # PEP 562; what it does not know, diffusers' own lookup still finds


def _supply_library(loading_utils: ModuleType) -> None:
    methods = ["save_pretrained", "from_pretrained"]
    loading_utils.LOADABLE_CLASSES[LIBRARY] = {"ModelMixin": methods, "SchedulerMixin": methods}


def _supply_quantizer(_: ModuleType) -> None:
    importlib.import_module(QUANTIZER)  # registers itself; it may also be what is importing diffusers right now


_SUPPLIES: dict[str, Callable[[ModuleType], None]] = {
    "diffusers": _supply_classes,
    "diffusers.pipelines.pipeline_loading_utils": _supply_library,
    "diffusers.quantizers.auto": _supply_quantizer,
}


class _AfterImport(MetaPathFinder):
    """Finds the modules that are supplied with something as the other finders do, and supplies them once executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _SUPPLIES:
            return None
        spec = _first_spec((finder for finder in sys.meta_path if finder is not self), fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_supply(module: ModuleType) -> None:
                execute(module)
                _SUPPLIES[fullname](sys.modules[fullname])  # diffusers puts another module in its own place

            spec.loader.exec_module = execute_and_supply
        return spec


def _first_spec(
    finders: Iterable[Any], fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    specs = (finder.find_spec(fullname, path, target) for finder in finders)
    return next((spec for spec in specs if spec is not None), None)
