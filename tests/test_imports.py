"""Who imports whom: no circle, and no room that imports one above it. Lazy and TYPE_CHECKING imports count as well."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT


# From the lowest floor to the highest; rooms of one floor do not import each other. An arrow never points up.
PACKAGE_FLOORS = [
    {"limits", "number_checks", "signal_handling", "user_path", "version", "wording"},
    {
        "assets",
        "atomic_write",
        "dtypes",
        "frame_counts",
        "eager_operator",
        "host_copies",
        "hub_cards",
        "json_files",
        "latency",
        "registration",
        "setting_types",
        "tensor_checks",
        "triton_launch",
    },
    {"schedulers", "video"},
    {"fp8"},
    {"fused", "parallel"},
    {"nvfp4"},
    {"loaders"},
    {"models"},
    {"pipelines"},
    {"conversion"},
    {"", "benchmark", "serve"},  # "" is longlive_diffusers/__init__.py, which names what is public
    {"cli"},
]
# training/ is started by path, so that its rooms are packages of their own; every room imports the installed package.
TRAINING_FLOORS = [
    {"objectives"},
    {"run"},
    {"data"},
    {"train_ar", "train_dmd"},
    {"benchmarks", "toy"},
]


def modules_below(folder: Path) -> dict[str, Path]:
    """The Python files below `folder`, by the name that they are imported by from there."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules among `modules` that this one imports anywhere in its file."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([part for part in start if part] + ([node.module] if node.module else []))
            # `from .models import attention` is of the module, `from .models import KVCache` of the package.
            names = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in modules else source for name in names}
    return (found & modules.keys()) - {module}


def import_graph(folder: Path, prefix: str = "") -> dict[str, set[str]]:
    """Module -> what it imports. `prefix` is the name of the package, where its modules are named by it."""
    modules = {
        prefix + ("." + name if prefix and name else name): path for name, path in modules_below(folder).items()
    }
    return {module: imports_of(module, path, modules) for module, path in modules.items()}


def package_graph() -> dict[str, set[str]]:
    return import_graph(ROOT / "longlive_diffusers", "longlive_diffusers")


def training_graph() -> dict[str, set[str]]:
    return import_graph(ROOT / "training")


def toy_graph() -> dict[str, set[str]]:
    return import_graph(ROOT / "training" / "toy")


@pytest.mark.parametrize("graph", [package_graph, training_graph, toy_graph])
def test_no_import_circle(graph):
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def arrows_between_rooms(graph: dict[str, set[str]], depth: int) -> set[tuple[str, str]]:
    """(room, imported room) of every import between two rooms; a room is part `depth` of a module's name."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[depth : depth + 1])

    return {(room(module), room(other)) for module, others in graph.items() for other in others}


@pytest.mark.parametrize(
    ("graph", "depth", "expected_floors"),
    [(package_graph, 1, PACKAGE_FLOORS), (training_graph, 0, TRAINING_FLOORS)],
)
def test_no_room_imports_one_above_it(graph, depth, expected_floors):
    floor_of = {room: floor for floor, rooms in enumerate(expected_floors) for room in rooms}
    arrows = {(above, below) for above, below in arrows_between_rooms(graph(), depth) if above != below}
    upward = {(above, below) for above, below in arrows if floor_of[above] <= floor_of[below]}
    assert upward == set()


def test_the_floors_name_every_room_of_the_package():
    rooms = {path.stem for path in (ROOT / "longlive_diffusers").iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms = {"" if room == "__init__" else room for room in rooms if room != "__pycache__"} | {"hub_cards"}
    assert rooms == set().union(*PACKAGE_FLOORS)


def test_the_toy_world_and_the_benchmarks_are_tied_to_nothing():
    """Who trains the 5B model never meets a plain shape."""
    rooms = {"toy", "benchmarks"}
    graph = training_graph()
    toy = set(toy_graph())
    for module, path in modules_below(ROOT / "training").items():
        if module.split(".")[0] not in rooms:
            assert {other.split(".")[0] for other in graph[module]}.isdisjoint(rooms), module
            assert imports_of(module, path, {name: path for name in toy}) == set(), module


def test_an_import_of_every_form_is_seen(tmp_path):
    """The check would pass on anything if it saw nothing."""
    folder = tmp_path / "house"
    (folder / "cellar").mkdir(parents=True)
    (folder / "__init__.py").write_text("from .cellar import shelf\n")
    (folder / "cellar" / "__init__.py").write_text("")
    (folder / "cellar" / "shelf.py").write_text("def open():\n    from ..attic import box\n")
    (folder / "attic.py").write_text("if TYPE_CHECKING:\n    import house.cellar.shelf\n")
    graph = import_graph(folder, "house")
    assert graph == {
        "house": {"house.cellar.shelf"},
        "house.cellar": set(),
        "house.cellar.shelf": {"house.attic"},
        "house.attic": {"house.cellar.shelf"},
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()
