"""The house keeps its shape: imports run one way, pure modules know no files or formats."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("createproject", "preprocessing", "mergeh5", "project_2d")

# From the top down: a module imports from its own level and those below.
LEVELS = {
    "running": (
        "cli",
        "path_checks",
        "key_file",
        "console",
        "stage",
        "outputs",
        "atomic_files",
        "locking",
        "parallel",
        "processes",
        "dask_cluster",
        "dask_worker",
        "progress",
        "worker",
        "report_cards",
        "interruption",
        "machine",
    ),
    "whole": ("study", "training_study"),
    "boundary": (
        "archive",
        "belonging",
        "candidates",
        "dicom",
        "dicom_masks",
        "dicom_pixels",
        "dicom_rtstruct",
        "dicom_scan",
        "dicom_seg",
        "dicom_seg_planes",
        "dicom_slices",
        "dicom_stack",
        "dicom_times",
        "dicom_values",
        "hdf5",
        "header_planes",
        "hdf5_assembly",
        "hdf5_check",
        "hdf5_chunks",
        "image_sizes",
        "lesion_table",
        "mapping",
        "nifti",
        "nifti_header",
        "pet_attributes",
        "pet_frames",
        "pet_header",
        "pictures",
        "pseudonyms",
        "raw_project",
        "report",
        "report_pictures",
        "role_hints",
        "roles",
        "steady_file",
        "study_files",
    ),
    "pure": (
        "angles",
        "body_mass",
        "components",
        "contours",
        "decay",
        "grid",
        "hashing",
        "image",
        "lesions",
        "losses",
        "plausibility",
        "pet_series",
        "pet_units",
        "projection",
        "remarks",
        "resampling",
        "spline_axes",
        "splits",
        "suv",
        "suv_alternatives",
        "suv_provenance",
        "timeline",
        "volumes",
    ),
    "errors": ("errors",),
}
ORDER = list(LEVELS)
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}

PURE_MAY_IMPORT = {
    "__future__", "collections", "common", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools",
    "hashlib", "hmac", "itertools", "json", "math", "nibabel", "nilearn", "numpy", "scipy",
    "typing", "unicodedata", "warnings", "numbers", "operator", "re",
}  # fmt: skip
FORMAT_LIBRARY = {
    "h5py": {"hdf5", "hdf5_assembly", "hdf5_check", "hdf5_chunks"},
    "hdf5plugin": {"hdf5_chunks"},
    "pydicom": {
        *("dicom", "dicom_masks", "dicom_pixels", "dicom_rtstruct", "dicom_seg", "dicom_stack"),
        *("dicom_scan", "dicom_seg_planes", "dicom_slices", "dicom_times"),
        *("dicom_values", "pet_attributes", "pet_frames", "pet_header"),
    },
    "isal": {"hdf5_chunks", "nifti"},
    "zipfile": {"archive"},
    "PIL": {"pictures", "report_pictures"},
    "jinja2": {"report"},
    "multiprocessing": {"parallel", "processes", "dask_cluster"},
    "dask": {"dask_cluster"},
    "distributed": {"dask_cluster"},
    "tqdm": {"progress", "console"},
    "argparse": {"cli", "console", "key_file", "path_checks"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports: ``common.x`` for ``from common import x``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"common.{alias.name}" for alias in node.names}
                if node.module == "common"
                else {node.module}
            )
    return found


def modules() -> list[str]:
    return sorted(p.stem for p in (ROOT / "common").glob("*.py") if p.stem != "__init__")


def test_every_module_has_a_room():
    assert set(modules()) <= set(LEVEL_OF)


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    level = ORDER.index(LEVEL_OF[module])
    for name in imports(ROOT / "common" / f"{module}.py"):
        if name.startswith("common."):
            other = LEVEL_OF[name.removeprefix("common.")]
            assert ORDER.index(other) >= level, f"{module} ({LEVEL_OF[module]}) imports {name}"


@pytest.mark.parametrize("module", modules())
def test_no_module_imports_a_script(module):
    assert not imports(ROOT / "common" / f"{module}.py") & set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_import_scripts(script):
    assert not imports(ROOT / f"{script}.py") & set(SCRIPTS)


@pytest.mark.parametrize("module", [m for m in modules() if LEVEL_OF.get(m) == "pure"])
def test_pure_modules_know_no_paths_logs_or_formats(module):
    used = {name.partition(".")[0] for name in imports(ROOT / "common" / f"{module}.py")}
    assert used <= PURE_MAY_IMPORT


@pytest.mark.parametrize("library", sorted(FORMAT_LIBRARY))
def test_one_boundary_knows_each_library(library):
    users = {
        module
        for module in modules()
        if library in {name.partition(".")[0] for name in imports(ROOT / "common" / f"{module}.py")}
    }
    assert users <= FORMAT_LIBRARY[library]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_hold_no_format_code(script):
    used = {name.partition(".")[0] for name in imports(ROOT / f"{script}.py")}
    assert not used & (set(FORMAT_LIBRARY) - {"argparse"})


def test_there_is_no_other_code_at_the_top():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(SCRIPTS)
