"""The house keeps its shape: imports between rooms run one way, pure files know no formats."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("createproject", "preprocessing", "mergeh5", "project_2d")
BOUNDARY_FILES = ("nifti", "packages", "project_zip", "nnunet")

ARROWS = {
    "pure": set(),
    "packages": set(),
    "nifti": {"packages", "pure"},
    "project_zip": {"nifti", "suv", "pure"},
    "run": {"pure"},
    "suv": {"pure"},
    "dicom": {"packages", "suv", "pure"},
    "raw": {"dicom", "nifti", "suv", "run", "pure"},
    "hdf5": {"project_zip", "pure"},
    "nnunet": {"hdf5", "nifti", "run", "pure"},
    "report": {"nnunet", "hdf5", "suv", "run", "pure"},
}
"""The rooms whose files a room's files may import, besides its own."""

PURE_MAY_IMPORT = {
    "__future__", "collections", "common", "contextlib", "dataclasses", "datetime", "decimal",
    "enum", "errno", "fractions", "functools", "hashlib", "hmac", "itertools", "json", "math",
    "nibabel", "nilearn", "numbers", "numpy", "operator", "re", "scipy", "typing", "unicodedata",
    "warnings",
}  # fmt: skip
LIBRARY_ROOMS = {
    "h5py": {"hdf5"},
    "hdf5plugin": {"hdf5"},
    "pydicom": {"dicom"},
    "zipfile": {"project_zip"},
    "PIL": {"report"},
    "jinja2": {"report"},
    "multiprocessing": {"run"},
    "dask": {"run"},
    "distributed": {"run"},
    "tqdm": {"run"},
}
"""The only rooms that know a library."""


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports: ``common.x.y`` for ``from common.x import y``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def room_of(name: str) -> str:
    """Return the room of ``x`` or ``x.y`` below common/."""
    first = name.partition(".")[0]
    is_folder = (ROOT / "common" / first).is_dir()
    return first if is_folder or first in BOUNDARY_FILES else "pure"


MAP = ROOT / "common" / "__init__.py"
FILES = sorted(p for p in (ROOT / "common").rglob("*.py") if p.name != "__init__.py")
NAMES = [".".join(p.relative_to(ROOT / "common").with_suffix("").parts) for p in FILES]


@pytest.mark.parametrize(("name", "path"), list(zip(NAMES, FILES, strict=True)))
def test_imports_between_rooms_run_one_way(name, path):
    rooms = {
        room_of(used.removeprefix("common."))
        for used in imports(path)
        if used.startswith("common.")
    }
    assert rooms <= ARROWS[room_of(name)] | {room_of(name)}


ENTRIES = re.findall(
    r"^(\w+)(/?)  (.*(?:\n  .*)*)", ast.get_docstring(ast.parse(MAP.read_text())), re.MULTILINE
)
"""Of the map: each room or file of its own, whether it is a folder, and what is said of it."""

ORDER = [name for name, _, _ in ENTRIES]


@pytest.mark.parametrize(("name", "path"), list(zip(NAMES, FILES, strict=True)))
def test_imports_run_downwards_on_the_map(name, path):
    """Of rooms and of files outside them; so there is no circle."""
    here = name.partition(".")[0]
    used = {u.split(".")[1] for u in imports(path) if u.startswith("common.")} - {here}
    assert all(ORDER.index(here) < ORDER.index(other) for other in used)


def test_every_file_is_on_the_map():
    on_it = {name for name, folder, _ in ENTRIES if not folder}
    for room, folder, said in ENTRIES:
        on_it |= {f"{room}.{word}" for word in re.findall(r"\w+", said) if folder}
    assert set(NAMES) <= on_it
    assert {name for name in on_it if "." not in name} <= set(NAMES)


@pytest.mark.parametrize("path", [*FILES, *(ROOT / f"{script}.py" for script in SCRIPTS)])
def test_nothing_imports_a_script(path):
    assert not libraries(path) & set(SCRIPTS)


@pytest.mark.parametrize(
    "path", [p for name, p in zip(NAMES, FILES, strict=True) if room_of(name) == "pure"]
)
def test_pure_files_know_no_paths_logs_or_formats(path):
    assert libraries(path) <= PURE_MAY_IMPORT


@pytest.mark.parametrize("library", sorted(LIBRARY_ROOMS))
def test_a_library_is_known_in_its_room_alone(library):
    users = {room_of(n) for n, p in zip(NAMES, FILES, strict=True) if library in libraries(p)}
    assert users <= LIBRARY_ROOMS[library]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_hold_no_format_code(script):
    assert not libraries(ROOT / f"{script}.py") & set(LIBRARY_ROOMS)


def test_there_is_no_other_code_at_the_top():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(SCRIPTS)
