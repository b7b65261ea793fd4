"""The rooms and their floors, stated once; who imports whom, read from the source; the picture of it in docs/.

`python tests/rooms.py` draws docs/rooms.svg anew; test_imports.py holds the source to the floors and the picture to the source.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A room imports only from rooms before it, and a module of a room only from modules before it.
FLOORS = {
    "experiments.records": [
        "errors", "record", "documents", "tables", "provenance", "terminal", "metrics", "store", "crate"
    ],
    "experiments.spec": ["spec", "expand", "shapes", "formats", "traces", "workload"],
    "experiments.engine": ["session", "arguments", "vllm_engine", "engine_process", "worker"],
    "experiments.simulator": ["calibration", "memory", "compiled", "cost_model", "scheduler", "simulator", "estimate"],
    "experiments.machine": ["gpus", "doctor"],
    "experiments.calibrate": ["published", "tables", "gpu", "end_to_end", "fit", "here"],
    "experiments.cluster": ["placement", "plan", "local_ray", "cluster", "trials"],
    "experiments": ["run"],
    "analysis.judge": ["known", "trial", "integrity", "load", "archive", "stats", "scope", "gates", "claims", "verify"],
    "analysis.show": [
        "summary", "plots", "plots_serving", "plots_schedule", "plots_advice", "views", "report", "export"
    ],
    "analysis.advise": [
        "power", "capacity", "question", "case", "advice", "tell", "on_gpu", "on_engine", "on_server", "recommend",
        "paper_capacity", "validate", "gpu_check"
    ],
}  # fmt: skip
ROOM = {f"{room}.{module}": room for room, modules in FLOORS.items() for module in modules}  # of each module, in order
PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, ROW, BOX, BEND = 560, 46, 300, 24


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def modules() -> list[Path]:
    found = sorted(path for folder in ("experiments", "analysis") for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if path.name != "__init__.py"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, and every name that it imports from one, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def purpose(room: str) -> str:
    """The docstring of a room's __init__.py."""
    return ast.get_docstring(ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())) or ""


def draw() -> str:
    """An SVG: a row for each room, the ground floor last; an arrow on the right from each room to each that it imports from."""
    rooms = [*reversed(FLOORS)]
    arrows = {(ROOM[name_of(path)], ROOM[other]) for path in modules() for other in imports(path) if other in ROOM}
    rows = sorted((rooms.index(a), rooms.index(b)) for a, b in arrows if a != b)
    up = [(rooms[a], rooms[b]) for a, b in rows if a > b]
    height = ROW * len(rooms) + 8
    title = "Rooms and their imports"
    told = f"{len(rooms)} rooms, the ground floor below; {len(rows)} imports between rooms, {len(up)} of them upwards."
    font = "DejaVu Sans, Verdana, sans-serif"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="{font}" role="img">',
        f"<title>{title}</title><desc>{told}</desc>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs><rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for row, room in enumerate(rooms):
        name = "experiments/run.py" if room == "experiments" else f"{room.replace('.', '/')}/"
        said = purpose(room).split("\n")[0] if "." in room else "The command that a user meets."
        y, fill = row * ROW + 6, "#eef3f8" if room.startswith("experiments") else "#fdf3e3"
        parts.append(f'<rect x="8" y="{y}" width="{BOX}" height="{ROW - 8}" rx="5" fill="{fill}" stroke="#444"/>')
        parts.append(f'<text x="18" y="{y + 16}" font-size="12" font-weight="bold" fill="#111">{name}</text>')
        parts.append(f'<text x="18" y="{y + 31}" font-size="11" fill="#333">{escape(said)}</text>')
    for a, b in rows:  # an arrow leaves a box in its lower half and ends in the upper half of another
        start, end, x = a * ROW + 32, b * ROW + 16, BOX + 8
        bend = x + BEND * (abs(b - a) + 1)
        colour = "#c00" if a > b else "#444"
        curve = f"M{x} {start} C{bend} {start} {bend} {end} {x + 1} {end}"
        parts.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-opacity="0.7" marker-end="url(#a)"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
