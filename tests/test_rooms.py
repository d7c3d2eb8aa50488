"""The layout itself: each room imports only rooms above it, and nothing heavy happens at import."""

import ast
from pathlib import Path

import headstart

SOURCE = Path(headstart.__file__).parent

ROOMS = (
    "errors",
    "config",
    "progress",
    "folders",
    "parallel",
    "interrupts",
    "tables",
    "places",
    "data",
    "tokens",
    "runs",
    "onnx",
    "engine",
    "modeling_headstart",
    "encoder",
    "features",
    "checkpoints",
    "peers",
    "targets",
    "model",
    "train",
    "trials",
    "thaw",
    "predict",
    "metrics",
    "judge",
    "prepare",
    "explain",
    "audit",
    "report",
    "track",
    "run",
    "selfcheck",
    "inputs",
    "recent",
    "estimator",
    "parts",
    "bulk",
    "export",
    "calibrate",
    "hub",
    "serve.queue",
    "serve.schema",
    "serve.guard",
    "serve.app",
    "serve.server",
    "workers",
    "scale",
    "serve.replicas",
    "__init__",
    "cli",
)


def file_of(room: str) -> Path:
    return SOURCE.joinpath(*room.split(".")).with_suffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The headstart modules that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "headstart":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "headstart.serve":
            found |= {f"serve.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("headstart."):
            found.add(node.module.removeprefix("headstart."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("headstart.")}
    return found


def test_every_file_is_a_listed_room() -> None:
    found = {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    assert found - {"serve.__init__"} == set(ROOMS)


def test_rooms_import_only_rooms_above_them() -> None:
    seen_any = False
    for place, room in enumerate(ROOMS):
        above = set(ROOMS[:place])
        imports = imported_rooms(file_of(room))
        seen_any |= bool(imports)
        assert imports <= above, f"{room} imports {sorted(imports - above)}, which stand below it"
    assert seen_any


def test_every_room_says_what_it_knows() -> None:
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse(file_of(room).read_text(encoding="utf-8")))
        assert docstring, room
        assert len(docstring.split()) >= 10, room


def test_every_room_has_a_test_file() -> None:
    tests = Path(__file__).parent
    for room in ROOMS:
        if room != "__init__":
            *folders, name = room.split(".")
            assert tests.joinpath(*folders, f"test_{name}.py").is_file(), room


def test_the_public_surface() -> None:
    assert headstart.__all__ == ["Encoder", "TextClassifier", "load", "train"]
    assert all(callable(getattr(headstart, name)) for name in headstart.__all__)


BUDGET, OVER = 4500, 5296
"""Lines that the source may have, and by how many it is over them: see docs/decisions.md."""


def test_the_source_does_not_grow_further_beyond_its_budget() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py"))
    assert lines <= BUDGET + OVER
