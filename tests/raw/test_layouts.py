"""Layouts as they come: nnU-Net raw, HECKTOR's flat and sited forms, BIDS with its sidecars."""

import json
import logging
import re

import layouts as raw
import numpy as np
import pytest
from layouts import SIDECAR, write_bids, write_case
from read_studies import read_images

from common.errors import StageError, StudyError
from common.raw.candidates import Patterns
from common.raw.layouts import find_studies, patient_in
from common.raw.project import list_files
from common.raw.roles import find_roles
from common.raw.sidecar import read_sidecar
from common.raw.study import Conversion
from common.suv.factors import suv_factors

FACTOR = 70_000 / (3e8 * 2 ** (-3600 / 6586.2))
"""SUVbw per Bq/ml of the sidecar, by hand."""


def read(folder, **options):
    conversion = Conversion(**options)
    roles = find_roles(folder, Patterns(), header_needed=conversion.needs_header)
    return read_images(roles, conversion)


# --- nnU-Net ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "ct", "pet"),
    [
        (None, "_0000", "_0001"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, "_0000", "_0001"),
        ({"channel_names": {"0": "SUV", "1": "CT"}}, "_0001", "_0000"),
        ({"modality": {"0": "CT", "1": "PT"}}, "_0000", "_0001"),
        (None, "__CT", "__PT"),
    ],
)
def test_a_case_of_nnunet_is_a_patient_and_its_channels_are_told_by_name(
    tmp_path, described, ct, pet
):
    write_case(tmp_path, "case_001", ct, pet)
    write_case(tmp_path, "case_002", ct, pet)
    if described:
        (tmp_path / "dataset.json").write_text(json.dumps(described))
    one, two = find_studies(tmp_path)
    assert (one.patient, one.study, two.patient) == ("case_001", "case_001", "case_002")
    assert len(list_files(one)) == 3
    images = read(one, pet_units="suv")
    np.testing.assert_array_equal(images.mask.data > 0, raw.LABELS > 0)
    np.testing.assert_array_equal(images.ct.data, raw.HU)
    np.testing.assert_allclose(images.pet.data, raw.SUV, rtol=1e-6)


def test_a_patient_is_found_in_the_name_of_a_case(tmp_path):
    for case in ("fdg_0a1_2003", "fdg_0a1_2004", "psma_7_2003"):
        write_case(tmp_path, case)
    found = find_studies(tmp_path, r"^(?:fdg|psma)_([0-9a-f]+)")
    assert [(each.patient, each.study) for each in found] == [
        ("0a1", "fdg_0a1_2003"),
        ("0a1", "fdg_0a1_2004"),
        ("7", "psma_7_2003"),
    ]


def test_channels_that_are_neither_ct_nor_pet_are_refused_with_their_names(tmp_path):
    write_case(tmp_path, "a")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "PET"}}')
    with pytest.raises(StageError, match=r"no channel ct \(channel_names: 0000: T1, 0001: PET\)"):
        find_studies(tmp_path)


def test_a_case_without_a_label_lacks_its_mask(tmp_path):
    write_case(tmp_path, "a")
    (tmp_path / "labelsTr" / "a.nii.gz").unlink()
    with pytest.raises(StudyError, match="no mask"):
        read(find_studies(tmp_path)[0], pet_units="suv")


# --- sites -----------------------------------------------------------------------------------


def write_site(root, n_patients=6):
    for number in range(1, n_patients + 1):
        (root / "Task 1" / f"CHUM-{number:03}").mkdir(parents=True)


@pytest.mark.parametrize("n_patients", [2, 6])
def test_folders_of_patients_below_a_site_are_told_of(tmp_path, caplog, n_patients):
    write_site(tmp_path, n_patients)
    with caplog.at_level(logging.WARNING, "tumorvolume"):
        logging.getLogger("tumorvolume").propagate = True
        find_studies(tmp_path)
    assert f"{n_patients} folders lie below 1 folder(s) at the place of a patient" in caplog.text
    assert "--patient" in caplog.text
    assert "CHUM" not in caplog.text


def test_dated_examinations_of_one_patient_are_no_patients(tmp_path, caplog):
    for year in range(2000, 2008):
        (tmp_path / "p" / f"{year}0103_PETCT").mkdir(parents=True)
        (tmp_path / "PETCT_1" / f"03-23-{year}-NA-PET-CT mit KM-10445").mkdir(parents=True)
    for study in ("ses-1", "ses-2", "FDG", "PSMA"):
        (tmp_path / "train_0001" / study).mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "tumorvolume"):
        find_studies(tmp_path)
    assert not caplog.text


def test_patients_below_a_site_are_found_by_their_names(tmp_path):
    write_site(tmp_path)
    found = find_studies(tmp_path, r"[A-Z]+-\d+")
    assert [each.patient for each in found] == [f"CHUM-{n:03}" for n in range(1, 7)]
    assert {each.study for each in found} == {f"Task 1/CHUM-{n:03}" for n in range(1, 7)}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("Dataset001/imagesTr", r"1 folder\(s\) in it are of nnU-Net's layout \(imagesTr\)"),
        ("ds000/sub-01", r"1 folder\(s\) in it are of BIDS's layout \(sub-\*\)"),
    ],
)
def test_the_folder_above_another_layout_is_refused(tmp_path, folder, message):
    """nnU-Net's imagesTr was taken as a study of a patient Dataset001."""
    raw.write_nifti(tmp_path / folder / "a_0000.nii.gz", raw.HU)
    with pytest.raises(StageError, match=f"{message}: give such a folder itself"):
        find_studies(tmp_path)


def test_a_part_of_nnunet_or_files_right_below_a_patient_are_told_of(tmp_path):
    write_case(tmp_path, "a")
    with pytest.raises(StageError, match="part of nnU-Net's layout: give the folder above it"):
        find_studies(tmp_path / "imagesTr")
    raw.write_nifti(tmp_path / "flat" / "CHUM-001" / "CHUM-001__CT.nii.gz", raw.HU)
    with pytest.raises(StageError, match=r"or give the folder above, .* with --patient REGEX"):
        find_studies(tmp_path / "flat")


def test_a_pattern_that_finds_one_patient_everywhere_is_told_of(tmp_path, caplog):
    write_site(tmp_path)
    with caplog.at_level(logging.WARNING, "tumorvolume"):
        logging.getLogger("tumorvolume").propagate = True
        find_studies(tmp_path, "[A-Z]+(?=-)")
    assert "one and the same patient in all 6 names" in caplog.text


def test_a_pattern_has_no_place_in_bids(tmp_path):
    write_bids(tmp_path)
    with pytest.raises(StageError, match=r"BIDS does \(sub-\.\.\.\): leave it out"):
        find_studies(tmp_path, r"\d+")


def test_a_pattern_that_does_not_fit_every_study_is_refused_without_a_name():
    with pytest.raises(StageError, match="finds no patient") as caught:
        patient_in("Jane Doe", r"\d+")
    assert "Jane" not in str(caught.value)


# --- BIDS ------------------------------------------------------------------------------------


def test_a_session_of_bids_is_a_study_and_its_sidecar_gives_the_suv(tmp_path):
    write_bids(tmp_path)
    write_bids(tmp_path, session="ses-b")
    write_bids(tmp_path, subject="sub-02")
    found = find_studies(tmp_path)
    assert [(each.patient, each.study) for each in found] == [
        ("sub-01", "ses-a"),
        ("sub-01", "ses-b"),
        ("sub-02", "ses-a"),
    ]
    images = read(found[0])
    np.testing.assert_allclose(images.pet.data, raw.SUV * FACTOR, rtol=1e-6)
    np.testing.assert_array_equal(images.mask.data > 0, raw.LABELS > 0)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"Units": "kBq/mL"}, 1000),
        ({"InjectedRadioactivity": 3e8, "InjectedRadioactivityUnits": "Bq"}, 1),
        ({"TracerRadionuclide": "18F"}, 1),
        ({"TimeZero": "23:30:00"}, 1),
        ({"ImageDecayCorrectionTime": 0}, 2 ** (-3600 / 6586.2)),
        ({"InjectionStart": -600, "ImageDecayCorrectionTime": 3000}, 1),
    ],
)
def test_units_and_times_of_a_sidecar_are_understood(tmp_path, changes, times):
    write_bids(tmp_path, sidecar=SIDECAR | changes)
    images = read(find_studies(tmp_path)[0])
    np.testing.assert_allclose(images.pet.data, raw.SUV * FACTOR * times, rtol=1e-6)


def test_values_without_decay_correction_refer_to_the_middle_of_the_frame(tmp_path):
    write_bids(tmp_path, sidecar=SIDECAR | {"ImageDecayCorrected": False})
    images = read(find_studies(tmp_path)[0])
    rate = np.log(2) / 6586.2
    middle_s = np.log(rate * 120 / (1 - np.exp(-rate * 120))) / rate
    expected = FACTOR * 2 ** (middle_s / 6586.2)
    np.testing.assert_allclose(images.pet.data, raw.SUV * expected, rtol=1e-6)


def test_values_that_are_suv_need_no_times_and_no_dose(tmp_path):
    """They were warned of, as if corrected for decay and not."""
    sidecar = {"Units": "SUV", "ImageDecayCorrected": True, "AttenuationCorrection": "CT-based"}
    write_bids(tmp_path, sidecar=sidecar | {"InjectedRadioactivity": None})
    images = read(find_studies(tmp_path)[0])
    np.testing.assert_allclose(images.pet.data, raw.SUV, rtol=1e-6)
    assert not any("Decay" in each.text for each in images.warnings)


def test_the_weight_may_stand_in_the_table_of_participants(tmp_path):
    sidecar = {name: value for name, value in SIDECAR.items() if name != "PatientWeight"}
    write_bids(tmp_path, sidecar=sidecar)
    (tmp_path / "participants.tsv").write_text("participant_id\tweight\nsub-01\t70\n")
    np.testing.assert_allclose(
        read(find_studies(tmp_path)[0]).pet.data, raw.SUV * FACTOR, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TimeZero", None),
        ("TimeZero", "nine"),
        ("InjectedRadioactivity", "300"),
        ("InjectedRadioactivityUnits", "mCi"),
        ("InjectionStart", None),
        ("ImageDecayCorrected", None),
        ("ImageDecayCorrectionTime", None),
        ("TracerRadionuclide", "LU177"),
        ("Units", "counts"),
        ("FrameTimesStart", []),
    ],
)
def test_a_field_that_suv_needs_and_the_sidecar_lacks_is_named(tmp_path, name, value):
    path = tmp_path / "a_pet.json"
    path.write_text(json.dumps(SIDECAR | {name: value}))
    with pytest.raises(StudyError, match=f"no usable {name}"):
        read_sidecar(str(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"AttenuationCorrection": "none"}, "not corrected for attenuation"),
        ({"AttenuationCorrection": "No attenuation correction"}, "not corrected for attenuation"),
        ({"AttenuationCorrection": None}, "not corrected for attenuation"),
        ({"PatientWeight": None}, "no body weight: give it as weight"),
        ({"InjectedRadioactivity": 0}, "no usable InjectedRadioactivity"),
        ({"FrameTimesStart": [0, 60], "FrameDuration": [60, 60]}, "2 frames"),
    ],
)
def test_a_pet_that_is_no_static_corrected_image_is_refused(tmp_path, changes, reason):
    write_bids(tmp_path, sidecar=SIDECAR | changes)
    with pytest.raises(StudyError, match=reason):
        read(find_studies(tmp_path)[0])


@pytest.mark.parametrize(
    ("changes", "suv_type", "said"),
    [
        ({"InjectedRadioactivity": 5}, "bw", "InjectedRadioactivity in Bq is 5e+06"),
        ({"PatientWeight": 70000}, "bw", "PatientWeight is 1000 or more"),
        ({"ImageDecayCorrectionTime": 7200}, "bw", "ImageDecayCorrectionTime is 60 min after"),
        ({"InjectionStart": 3600}, "bw", "InjectionStart, FrameTimesStart, ImageDecayCorr"),
        ({"InjectionStart": -100000}, "bw", "the clock time of InjectionStart is used"),
        ({"PatientWeight": -1}, "bw", "(PatientWeight is -1): set it in the JSON sidecar"),
        ({"InjectionStart": 90000, "TracerRadionuclide": "ZR89"}, "bw", "(InjectionStart does not"),
        ({}, "ibw", "(height, sex): give a DICOM header"),
    ],
)
def test_what_is_said_of_a_sidecar_names_its_fields(tmp_path, changes, suv_type, said):
    """Attributes of DICOM were named, though no file has any."""
    path = tmp_path / "a_pet.json"
    path.write_text(json.dumps(SIDECAR | changes))
    try:
        conversion = suv_factors(read_sidecar(str(path)), suv_type)
        told = "; ".join(map(str, conversion.provenance.told))
    except StudyError as error:
        told = str(error)
    assert said in told
    assert not re.search(r"\([0-9A-F]{4},[0-9A-F]{4}\)", told)


def test_a_mask_of_another_session_is_not_taken(tmp_path):
    write_bids(tmp_path)
    write_bids(tmp_path, session="ses-b")
    (tmp_path / "derivatives/reader/sub-01/ses-b/sub-01_ses-b_label-tumor_mask.nii.gz").unlink()
    with pytest.raises(StudyError, match="no mask"):
        read(find_studies(tmp_path)[1])
