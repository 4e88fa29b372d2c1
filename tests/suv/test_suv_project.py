"""The tables of SUV cases through the whole first stage: DICOM files in, project zip out."""

import csv
import gzip
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from layouts import PET_AFFINE, write_nifti
from pet_headers import WEIGHT_KG, Array, pet_headers, phantom_suv, put_raw, write_pet_series
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from suv_cases import (
    CONVERT,
    IDEAL_KG,
    JAMES_KG,
    JANMAHASATIAN_KG,
    N_SLICES,
    REFUSE,
    SURFACE_M2,
    Case,
)

import createproject

PHANTOM = phantom_suv(N_SLICES)
CASES = {case.name: case for case in CONVERT}


def add_ct_and_mask(study: Path) -> None:
    """Complete a study, both on the grid of its PET."""
    write_nifti(study / "CT.nii.gz", np.zeros(PHANTOM.shape, np.int16), PET_AFFINE)
    write_nifti(study / "mask.nii.gz", (PHANTOM > 0).astype(np.uint8), PET_AFFINE)


def add_case(
    raw: Path, case: Case, change: Callable[[Dataset], None] = lambda header: None
) -> None:
    study = raw / case.name / "scan"
    case.write(study / "PT", change)
    add_ct_and_mask(study)


def add_headers(raw: Path, name: str, **header: Any) -> None:
    study = raw / name / "scan"
    write_pet_series(study / "PT", pet_headers(N_SLICES, **header), PHANTOM)
    add_ct_and_mask(study)


def run(raw: Path, *options: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Array]]:
    """Exit status, rows of the mapping and volumes of SUV, both by patient."""
    output = raw.with_name("project.zip")
    status = createproject.main([str(raw), "-o", str(output), "-j1", "-q", *options])
    with open(raw.with_name("project_mapping.csv"), encoding="utf-8", newline="") as stream:
        rows = {row["patient"]: row for row in csv.DictReader(stream)}
    volumes = {}
    with zipfile.ZipFile(output) as archive:
        for name, row in rows.items():
            if row["status"] == "written":
                member = f"raw/{row['hash']}/{row['hash']}_petsuv.nii.gz"
                content = gzip.decompress(archive.read(member))
                volumes[name] = np.asarray(nibabel.Nifti1Image.from_bytes(content).dataobj)
    return status, rows, volumes


def as_built(header: Dataset) -> None:
    """Leave a header as it is."""


def as_sloppy_software_writes(header: Dataset) -> None:
    """Shorten times, pad numbers, lose the private creators; all of it says the same."""

    def rewrite(dataset: Dataset, element: DataElement) -> None:
        value = str(element.value)
        if element.tag.is_private:
            new, vr = value, "UN"
        elif element.VR == "TM":
            new, vr = shortened(value), "TM"
        elif element.VR == "DT":
            new, vr = value[:8] + shortened(value[8:]), "DT"
        elif element.VR == "DS" and element.VM == 1:
            new, vr = f" {element.value:.8E}", "DS"
        else:
            return
        put_raw(dataset, element.tag, new.encode() + b" " * (len(new) % 2), vr)

    for element in [each for each in header if each.tag.is_private_creator]:
        del header[element.tag]
    header.walk(rewrite)


def shortened(clock: str) -> str:
    """A time of day without the zeros that may be left out."""
    return re.sub(r"00$", "", re.sub(r"\.?0*$", "", clock).ljust(6, "0"))


@pytest.mark.parametrize("change", [as_built, as_sloppy_software_writes])
def test_every_header_that_must_convert_does(
    change: Callable[[Dataset], None], tmp_path: Path
) -> None:
    for case in CONVERT:
        add_case(tmp_path / "raw", case, change)
    status, rows, volumes = run(tmp_path / "raw")
    assert {row["reason"] for row in rows.values() if row["status"] != "written"} == set()
    assert status == 0
    assert len(volumes) == 43
    for name, suv in volumes.items():
        np.testing.assert_allclose(suv, PHANTOM, atol=5e-4, err_msg=name)


@pytest.mark.parametrize("n_headers", [None, 1])
def test_every_header_that_must_convert_serves_a_nifti_pet(
    n_headers: int | None, tmp_path: Path
) -> None:
    """All headers of the series, or one; which is too few where decay was not corrected for."""
    raw, uncorrected = tmp_path / "raw", set()
    for case in CONVERT:
        study = raw / case.name / "scan"
        _, stored, slopes = case.write(study / "header")
        for path in sorted((study / "header").iterdir())[n_headers:] if n_headers else ():
            path.unlink()
        write_nifti(study / "PET.nii.gz", (stored * slopes).astype(np.float32), PET_AFFINE)
        add_ct_and_mask(study)
        if n_headers and "13" in case.rule:
            uncorrected.add(case.name)
    _, rows, volumes = run(raw)
    assert rows.keys() - volumes.keys() == uncorrected
    for name in uncorrected:
        assert "DecayCorrection (0054,1102) is NONE" in rows[name]["reason"]
    for name, suv in volumes.items():
        np.testing.assert_allclose(suv, PHANTOM, atol=6e-4, err_msg=name)


def test_every_header_that_must_be_refused_is_with_its_reason(tmp_path: Path) -> None:
    for name, header, _ in REFUSE:
        add_headers(tmp_path / "raw", name, **header)
    status, rows, volumes = run(tmp_path / "raw")
    assert status == 3
    assert not volumes
    for name, _, what in REFUSE:
        assert rows[name]["status"] == "failed"
        assert what in rows[name]["reason"]


@pytest.mark.parametrize("suv_type", ["bw", "lbm-janma", "lbm-james", "ibw", "bsa"])
def test_every_type_of_suv_comes_from_every_unit(suv_type: str, tmp_path: Path) -> None:
    sources = [
        "default",
        "GML",
        "GML LBMJAMES128 M",
        "GML IBW O",
        "GML LBMJANMA F",
        "CM2ML",
        "CNTS, Philips SUV factor",
        "CNTS, Philips activity factor",
        "enhanced, GML",
    ]
    raw = tmp_path / "raw"
    for name in sources:
        add_case(raw, CASES[name])
    add_headers(raw, "no height", PatientSize=None)
    add_headers(raw, "no sex", PatientSex=None)
    _, rows, volumes = run(raw, "--suv-type", suv_type)

    for name in sources:
        sex = CASES[name].header.get("PatientSex", "F")
        per_suvbw = {
            "bw": 1.0,
            "lbm-janma": JANMAHASATIAN_KG[sex] / WEIGHT_KG,
            "lbm-james": JAMES_KG[sex] / WEIGHT_KG,
            "ibw": IDEAL_KG[sex] / WEIGHT_KG,
            "bsa": SURFACE_M2 * 1e4 / (WEIGHT_KG * 1e3),
        }[suv_type]
        np.testing.assert_allclose(volumes[name], PHANTOM * per_suvbw, atol=5e-4, err_msg=name)
    needs_height, needs_sex = suv_type != "bw", suv_type not in ("bw", "bsa")
    assert ("PatientSize (0010,1020) is missing" in rows["no height"]["reason"]) is needs_height
    assert ("PatientSex (0010,0040) is missing" in rows["no sex"]["reason"]) is needs_sex
    assert ("no height" in volumes, "no sex" in volumes) == (not needs_height, not needs_sex)


def without_slope(header: Dataset) -> None:
    for frame in header.PerFrameFunctionalGroupsSequence:
        frame.PixelValueTransformationSequence[0].RescaleSlope = 1


def without_rescaling(header: Dataset) -> None:
    for frame in header.PerFrameFunctionalGroupsSequence:
        del frame.PixelValueTransformationSequence


def with_mapping_of_the_object(header: Dataset) -> None:
    without_rescaling(header)
    for frame in header.PerFrameFunctionalGroupsSequence:
        header.RealWorldValueMappingSequence = frame.RealWorldValueMappingSequence
        del frame.RealWorldValueMappingSequence


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("enhanced, several slopes", without_slope),
        ("enhanced, several slopes", without_rescaling),
        ("enhanced", with_mapping_of_the_object),
    ],
)
def test_enhanced_pet_may_be_scaled_by_its_mapping_alone(
    name: str, change: Callable[[Dataset], None], tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    case = CASES[name]
    add_case(raw, case, change)
    # A NIfTI PET is in the unit of its header already.
    study = raw / "NIfTI" / "scan"
    _, stored, slopes = case.write(study / "header", change)
    write_nifti(study / "PET.nii.gz", (stored * slopes).astype(np.float32), PET_AFFINE)
    add_ct_and_mask(study)
    status, _, volumes = run(raw, "--strict")
    assert status == 0
    for name in (case.name, "NIfTI"):
        np.testing.assert_allclose(volumes[name], PHANTOM, atol=5e-4, err_msg=name)


def test_values_given_as_suv_keep_the_scale_of_a_mapping_alone(tmp_path: Path) -> None:
    add_case(tmp_path / "raw", CASES["enhanced, GML"], without_slope)
    status, _, volumes = run(tmp_path / "raw", "--pet-units", "suv")
    assert status == 0
    np.testing.assert_allclose(volumes["enhanced, GML"], PHANTOM, atol=5e-4)


@pytest.mark.parametrize("options", [[], ["--pet-units", "suv"]])
def test_a_dry_run_refuses_values_that_are_offset_as_the_run_does(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_headers(tmp_path / "raw", "offset", RescaleIntercept=-5)
    said = "the values are offset (RescaleIntercept (0028,1052) of the PET is -5)"
    status, rows, _ = run(tmp_path / "raw", *options)
    assert status == 3
    assert said in rows["offset"]["reason"]
    command = [str(tmp_path / "raw"), "-o", str(tmp_path / "dry.zip"), "-j1", "--dry-run"]
    assert createproject.main([*command, *options]) == 3
    assert said in capsys.readouterr().out


def test_strict_refuses_grams_and_megabecquerels_whatever_the_units(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    add_headers(raw, "plain")
    add_headers(raw, "grams", PatientWeight=70_000)
    add_headers(raw, "grams beside SUV", PatientWeight=70_000, Units="GML")
    add_headers(raw, "megabecquerels", RadionuclideTotalDose=368.08)
    assert run(raw)[0] == 0
    for options in ([], ["--pet-units", "bqml"], ["--pet-units", "suv"]):
        status, rows, _ = run(raw, "--strict", *options)
        refused = {name for name, row in rows.items() if "refused by --strict" in row["reason"]}
        doubtful = {"grams", "grams beside SUV"}
        assert refused == doubtful | ({"megabecquerels"} if options[1:] != ["suv"] else set())
        assert status == 3
