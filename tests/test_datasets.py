"""Every command of docs/datasets.md, run on a small project of exactly that layout."""

import json
import re
import shlex
from pathlib import Path

import layouts as raw
import numpy as np
import pytest

import createproject
from common import project_zip

ROOT = Path(__file__).parents[1]
COMMANDS = [
    shlex.split(line)[2:]
    for line in (ROOT / "docs" / "datasets.md").read_text().splitlines()
    if line.startswith("python createproject.py ")
]
SIDECAR = {
    "Units": "Bq/mL",
    "TracerRadionuclide": "F18",
    "InjectedRadioactivity": 300.0,
    "InjectedRadioactivityUnits": "MBq",
    "InjectionStart": 0,
    "TimeZero": "09:00:00",
    "FrameTimesStart": [3600],
    "FrameDuration": [120],
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 3600,
    "AttenuationCorrection": "CT-based",
}


def suv(path):
    raw.write_nifti(path, raw.SUV.astype(np.float32))


def ct(path):
    raw.write_nifti(path, raw.HU, raw.CT_AFFINE)


def mask(path):
    raw.write_nifti(path, raw.LABELS)


def autopet(root):
    for patient, study in (("PETCT_01", "a"), ("PETCT_01", "b"), ("PETCT_02", "c")):
        folder = root / patient / study
        for name in ("CT", "CTres"):
            ct(folder / f"{name}.nii.gz")
        for name in ("PET", "SUV"):
            suv(folder / f"{name}.nii.gz")
        mask(folder / "SEG.nii.gz")
    return 3, 2


def nnunet(root, cases, of_ct, of_pet):
    for case in cases:
        ct(root / "imagesTr" / f"{case}{of_ct}.nii.gz")
        suv(root / "imagesTr" / f"{case}{of_pet}.nii.gz")
        mask(root / "labelsTr" / f"{case}.nii.gz")


def autopet_3(root):
    cases = ("fdg_0011f3deaf_03-23-2003", "fdg_0011f3deaf_04-23-2003", "psma_95b833d65be26f_2018")
    nnunet(root, cases, "_0000", "_0001")
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    return 3, 2


def hecktor_22(root):
    nnunet(root, ("CHUM-001", "MDA-002"), "__CT", "__PT")
    return 2, 2


def hecktor_25(root):
    for patient in ("CHUM-001", "CHUP-002"):
        folder = root / "Task 1" / patient
        ct(folder / f"{patient}__CT.nii.gz")
        suv(folder / f"{patient}__PT.nii.gz")
        mask(folder / f"{patient}.nii.gz")
    return 2, 2


def tcia(root, write_mask):
    for patient in ("P-001", "P-002"):
        study = root / patient / "01-01-2003-NA-PET-CT"
        raw.write_ct(study / "2.000000-CT")
        raw.write_pet(study / "3.000000-PET")
        write_mask(study)
    return 2, 2


def lesions(root):
    return tcia(root, lambda study: raw.write_seg(study / "4.000000-Segmentation" / "1-1.dcm"))


def deep_psma(root):
    for tracer in ("PSMA", "FDG"):
        folder = root / "train_0001" / tracer
        ct(folder / "CT.nii.gz")
        suv(folder / "PET.nii.gz")
        mask(folder / "TTB.nii.gz")
        ct(folder / "totseg_24.nii.gz")
    return 2, 1


def head_neck(root):
    def write(study):
        raw.write_rtstruct(study / "5.000000-RTstruct" / "1-1.dcm", name="GTV-1")

    return tcia(root, write)


def qin(root):
    def write(study):
        for number, reader in enumerate(("User1", "User2"), start=1):
            raw.write_seg(
                study / f"{number}-SEG" / "1-1.dcm",
                SeriesInstanceUID=f"1.2.{number}",
                SeriesDescription=f"tumor segmentation - {reader} Manual trial 1",
            )

    return tcia(root, write)


def bids(root):
    stem = "sub-01_ses-a"
    own = root / "sub-01" / "ses-a"
    ct(own / "ct" / f"{stem}_ct.nii.gz")
    raw.write_nifti(own / "pet" / f"{stem}_pet.nii.gz", raw.BQ_PER_ML.astype(np.float32))
    (own / "pet" / f"{stem}_pet.json").write_text(json.dumps(SIDECAR))
    (root / "participants.tsv").write_text("participant_id\tweight\nsub-01\t70\n")
    mask(root / "derivatives" / "reader" / "sub-01" / "ses-a" / f"{stem}_label-tumor_mask.nii.gz")
    return 1, 1


LAYOUTS = {
    "FDG-PET-CT-Lesions": autopet,
    "autoPETIII": autopet_3,
    "hecktor2022": hecktor_22,
    "HECKTOR2025": hecktor_25,
    "PSMA-PET-CT-Lesions": lesions,
    "deepPSMA": deep_psma,
    "Head-Neck-PET-CT": head_neck,
    "QIN-HEADNECK": qin,
    "bids": bids,
}


def test_every_dataset_of_the_page_has_a_layout():
    assert [command[0] for command in COMMANDS] == list(LAYOUTS)


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_the_command_reads_the_layout(command, tmp_path, monkeypatch, capfd):
    n_studies, n_patients = LAYOUTS[command[0]](tmp_path / command[0])
    monkeypatch.chdir(tmp_path)
    assert createproject.main([*command, "-j", "1"]) == 0, capfd.readouterr().err
    path = Path(command[command.index("-o") + 1])
    held = project_zip.read_directory(path)
    assert len(held) == n_studies
    assert len({re.sub(r"...$", "", study_hash) for study_hash in held}) == n_patients
    for study in held.values():
        labels = project_zip.read_image(path, study, "mask").data
        assert np.count_nonzero(labels) == np.count_nonzero(raw.LABELS)
