"""Three tiny studies of the demo phantom, a lesion each, and all that the chain makes of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import createproject
import preprocessing
import project_2d
from examples import phantom

LESION = phantom.Lesion((0.0, 10.0, -60.0), (45.0, 45.0, 25.0), 12.0)
SCAN_MM = 130.0  # the head
STUDIES = {
    name: replace(phantom.DEMO_STUDIES[number], patient=name, study="1", lesions=(LESION,))
    for name, number in (("rtstruct", 0), ("seg", 2), ("nifti", 3))
}
"""By their mask, or their images: DICOM with RTSTRUCT, DICOM with SEG, NIfTI."""

GRID = ["--shape", "24", "24", "--spacing", "20", "20", "6"]
ANGLES = ["--angles", "0", "180", "60"]


def write_raw(folder: Path, **changes: Any) -> None:
    """Write ``<folder>/{rtstruct,seg,nifti}/1``, their descriptions changed as told."""
    for study in STUDIES.values():
        grids = phantom.ct_grid(24, 14, SCAN_MM), phantom.pet_grid(24, 14, SCAN_MM)
        phantom.write_study(folder, replace(study, **changes), *grids)


def write_chain(folder: Path) -> None:
    """Write raw/, project.zip, 3d.h5 and 2d.h5."""
    write_raw(folder / "raw")
    for main, source, output, *options in (
        (createproject.main, "raw", "project.zip"),
        (preprocessing.main, "project.zip", "3d.h5", *GRID),
        (project_2d.main, "3d.h5", "2d.h5", *ANGLES),
    ):
        assert main([str(folder / source), "-o", str(folder / output), *options, "-j", "1"]) == 0
