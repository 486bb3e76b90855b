"""The house: which room may import which, no circles, and rooms small enough to see through.

Every import counts, also one inside a function or for type checkers only.
"""

import ast
import re
import statistics
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import REPO

GROUND = "ground floor"
ENTRIES = "entry points"
FOLDERS = ("kernels", "pipeline", "trainer", "evals")
ROOMS: dict[str, str] = {
    # From the ground up; a room may import those named, all of them above its own line here.
    GROUND: "",
    "kernels": "",
    "pipeline.config": GROUND,
    "pipeline.text": f"{GROUND}, pipeline.config",
    "pipeline.model": f"{GROUND}, pipeline.config",
    "pipeline.store": f"{GROUND}, pipeline.config, pipeline.text, pipeline.model",
    "pipeline.capture": f"{GROUND}, pipeline.config, pipeline.text, pipeline.model, pipeline.store",
    "pipeline.plan": "pipeline.config, pipeline.model, pipeline.store",
    "trainer.config": GROUND,
    "trainer.data": f"{GROUND}, pipeline.text, pipeline.store",
    "trainer.coder": f"{GROUND}, kernels, pipeline.model, trainer.config, trainer.data",
    "trainer.step": f"{GROUND}, kernels, pipeline.store, trainer.config, trainer.data, trainer.coder",
    "trainer.run": (
        f"{GROUND}, pipeline.model, pipeline.store, trainer.config, trainer.data, trainer.coder, trainer.step"
    ),
    "trainer.bank": (
        f"{GROUND}, pipeline.model, pipeline.store, trainer.config, trainer.data, trainer.coder, trainer.step, "
        "trainer.run"
    ),
    "trainer.formats": (
        f"{GROUND}, pipeline.store, trainer.config, trainer.data, trainer.coder, trainer.step, trainer.run"
    ),
    "evals.config": GROUND,
    "evals.stats": "trainer.run",
    "evals.core": (
        f"{GROUND}, pipeline.text, pipeline.model, pipeline.store, trainer.coder, trainer.data, trainer.run, "
        "trainer.step, evals.config, evals.stats"
    ),
    "evals.latents": f"{GROUND}, pipeline.store, trainer.run, evals.config",
    "evals.tasks": (
        f"{GROUND}, kernels, pipeline.text, pipeline.model, pipeline.store, trainer.config, trainer.data, "
        "trainer.coder, trainer.run, evals.config, evals.stats, evals.core"
    ),
    "evals.explain": f"{GROUND}, pipeline.model, trainer.run, evals.config, evals.stats, evals.latents",
    "evals.features": "trainer.run, evals.core, evals.latents, evals.explain",
    "evals.tables": (
        f"{GROUND}, pipeline.capture, pipeline.store, trainer.config, trainer.coder, trainer.run, evals.stats, "
        "evals.core"
    ),
    "evals.splice": f"{GROUND}, pipeline.model, trainer.config, trainer.coder",
    "evals.circuits": (
        f"{GROUND}, pipeline.model, pipeline.store, trainer.config, trainer.coder, trainer.run, "
        "evals.config, evals.latents, evals.explain, evals.features, evals.splice"
    ),
    "evals.explorer": f"{GROUND}, pipeline.store, trainer.run, evals.splice",
    "evals.export": (
        f"{GROUND}, pipeline.store, trainer.config, trainer.coder, trainer.run, trainer.formats, "
        "evals.config, evals.core, evals.latents, evals.explain, evals.features, evals.tables"
    ),
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name below `skipcoder`."""
    found = {f"skipcoder.{path.stem}": path for path in (REPO / "skipcoder").glob("*.py") if path.stem != "__init__"}
    for folder in FOLDERS:
        for path in (REPO / folder).rglob("*.py"):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(("skipcoder", *parts)).removesuffix(".__init__")] = path
    found["hydra_plugins.skipcoder_bank"] = found.pop("skipcoder.trainer.hydra_plugins.skipcoder_bank")
    return found


def room_of(module: str) -> str:
    """The room of a module."""
    _, folder, *rest = (*module.split("."), "")
    if module.startswith("hydra_plugins"):
        return ENTRIES
    if folder not in FOLDERS:
        return GROUND
    if folder == "kernels":
        return "kernels"
    is_entry = len(rest) == 2 and f"{folder}.{rest[0]}" not in ROOMS
    return ENTRIES if is_entry else f"{folder}.{rest[0]}"


@cache
def imports() -> dict[str, set[str]]:
    """The modules of ours that each module imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}: relative import"
                targets |= {
                    name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names
                }
        found[module] = {target for target in targets if target.split(".")[0] in ("skipcoder", "hydra_plugins")}
    return found


def test_rooms_import_what_the_table_says() -> None:
    allowed = {room: {name.strip() for name in names.split(",") if name} for room, names in ROOMS.items()}
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in imports().items():
        room = room_of(module)
        for target in targets - {"skipcoder"}:
            of_python = module.endswith(".api")  # an entry for those who come from Python, to what programs do
            assert room_of(target) != ENTRIES or of_python, f"{module} imports an entry point, {target}"
            if room != ENTRIES and room_of(target) != room:
                assert room_of(target) in allowed[room], f"{module} imports {target}"
                used[room].add(room_of(target))
    assert used == allowed, "the table names imports that nobody makes any more"


def test_the_table_goes_down() -> None:
    rooms = list(ROOMS)
    for place, names in enumerate(ROOMS.values()):
        for name in filter(None, names.split(", ")):
            assert rooms.index(name) < place, f"{rooms[place]} must not import {name}"


def test_no_circles() -> None:
    """graphlib raises CycleError, which names one."""
    assert len(list(TopologicalSorter(imports()).static_order())) >= len(modules())


def test_rooms_and_files_are_small() -> None:
    folders = [REPO / "skipcoder", *(p for folder in FOLDERS for p in (REPO / folder).rglob("*") if p.is_dir())]
    for folder in [*folders, *(REPO / folder for folder in FOLDERS)]:
        assert len(list(folder.glob("*.py"))) <= 12, folder
    sizes = [path.stat().st_size for path in modules().values()]
    assert statistics.median(sizes) <= 5_000
    ours = [*modules().values(), *(p for folder in ("tests", "benchmarks") for p in (REPO / folder).rglob("*.py"))]
    assert not [path for path in ours if path.stat().st_size > 15_000]


def test_links_lead_to_the_folders_and_nothing_is_a_package_at_the_top() -> None:
    for folder in (*FOLDERS, "conf"):
        link = REPO / "skipcoder" / folder
        assert link.is_symlink() and link.readlink() == Path("..", folder)
        assert not (REPO / folder / "__init__.py").exists()


def test_walks_name_the_rooms_in_order_each_once() -> None:
    """docs/walks.md: every room exists, no walk comes to one twice, and every name in it is in that room."""
    page = (REPO / "docs" / "walks.md").read_text()
    for walk in page.split("\n## ")[1:]:
        steps = re.findall(r"^\d+\. \*\*`([a-z/]+)/`\*\* (.+?)(?=^\d+\. |\Z|\n\n)", walk, re.M | re.S)
        rooms = [room for room, _ in steps]
        assert len(rooms) >= 4 and len(set(rooms)) == len(rooms)
        for room, text in steps:
            assert room.replace("/", ".") in ROOMS, room
            for name in re.findall(r"`([a-z_]+)(?:\.[\w.]+)?`", text):
                assert (REPO / room / f"{name}.py").exists() or (REPO / room / name).is_dir(), f"{room}: {name}"


def test_contributing_maps_every_room_on_one_screen() -> None:
    page = (REPO / "CONTRIBUTING.md").read_text()
    (text,) = re.findall(r"```\n(skipcoder/.+?)```", page, re.S)
    assert len(text.splitlines()) <= 50
    for room in ROOMS:
        assert room == GROUND or re.search(rf"^ *{room.split('.')[-1]}(/|\.py)?\b", text, re.M), room
