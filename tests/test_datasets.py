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


def text(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def autopet(root):
    for patient, study in (
        ("PETCT_0011f3deaf", "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445"),
        ("PETCT_0011f3deaf", "04-04-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10446"),
        ("PETCT_01140d52d8", "08-13-2005-NA-PET-CT Ganzkoerper  primaer mit KM-56839"),
    ):
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
    cases = (
        "fdg_0011f3deaf_03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445",
        "fdg_0011f3deaf_04-04-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10446",
        "psma_fad59ccacf4b88f2_2021-11-06",
    )
    nnunet(root, cases, "_0000", "_0001")
    text(root / "dataset.json", json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    text(root / "splits_final.json", "[]")
    return 3, 2


def hecktor_22(root):
    nnunet(root, ("CHUM-001", "MDA-002"), "__CT", "__PT")
    text(root / "hecktor2022_clinical_info_training.csv")
    return 2, 2


def hecktor(folder):
    """Write what every edition has: a patient's images, named by the patient."""
    ct(folder / f"{folder.name}__CT.nii.gz")
    suv(folder / f"{folder.name}__PT.nii.gz")
    return folder / f"{folder.name}.nii.gz"


def hecktor_25(root):
    for patient in ("CHUM-001", "CHUP-002"):
        mask(hecktor(root / "Task 1" / patient))
    text(root / "Task 1" / "HECKTOR_2025_Training_Task_1.csv")
    # No masks: skipped.
    folder = root / "Task 2" / "CHUM-001"
    hecktor(folder)
    for name in ("CTPlanning", "RTDOSE"):
        ct(folder / f"CHUM-001__{name}.nii.gz")
    text(root / "Task 2" / "HECKTOR_2025_Training_Task_2.csv")
    return 2, 2


def hecktor_26(root):
    for patient in ("CHUM-001", "MDA-258"):
        mask(hecktor(root / "hecktor2026_training" / patient))
    ct(root / "hecktor2026_training" / "MDA-258" / "MDA-258__RTDOSE.nii.gz")
    text(root / "hecktor2026_training" / "HECKTOR_2026_Training.csv")
    return 2, 2


def tcia(root, write_mask):
    for patient in ("P-001", "P-002"):
        study = root / patient / "01-01-2003-NA-PET-CT-12345"
        raw.write_ct(study / "2.000000-CT-12345")
        raw.write_pet(study / "3.000000-PET-23456")
        write_mask(study)
    text(root / "LICENSE")
    return 2, 2


def lesions(root):
    return tcia(
        root, lambda study: raw.write_seg(study / "300.000000-Segmentation-67890" / "1-1.dcm")
    )


def deep_psma(root):
    for tracer in ("PSMA", "FDG"):
        folder = root / "train_0001" / tracer
        ct(folder / "CT.nii.gz")
        suv(folder / "PET.nii.gz")
        mask(folder / "TTB.nii.gz")
        ct(folder / "totseg_24.nii.gz")
        text(folder / "threshold.json", '{"suv_threshold": 3.0}')
        text(folder / "rigid.tfm")
    return 2, 1


def head_neck(root):
    """Contours of the planning CT, brought onto CT and PET; the planning CT has no PET."""

    def write(study):
        for image, uid in (("CT", raw.CT_UID), ("PET", raw.PET_UID)):
            raw.write_rtstruct(
                study / f"1.000000-RTstructCTsim-{image}PET-CT-4529{len(image)}" / "1-1.dcm",
                drawn_on=uid,
                name="GTV",
                SeriesDescription=f"RTstruct_CTsim->{image}(PET-CT)",
            )
        raw.write_ct(study.with_name("01-01-2003-NA-TomoTherapy-00441") / "1-kVCT-62659")

    return tcia(root, write)


def qin(root):
    def write(study):
        for number, reader in enumerate(
            ("User1 Manual trial 1", "User1 Manual trial 2", "User1 SemiAuto trial 1",
             "User2 Manual trial 1")
        ):  # fmt: skip
            description = f"tumor segmentation - {reader}"
            raw.write_seg(
                study / f"{1000 + number}.000000-{description}-1130{number}" / "1-1.dcm",
                SeriesInstanceUID=f"1.2.{number}",
                SeriesDescription=description,
            )

    return tcia(root, write)


def bids(root):
    stem = "sub-01_ses-a"
    own = root / "sub-01" / "ses-a"
    ct(own / "ct" / f"{stem}_ct.nii.gz")
    pet = own / "pet" / f"{stem}_trc-18FFDG_rec-acstat_pet.nii.gz"
    raw.write_nifti(pet, raw.BQ_PER_ML.astype(np.float32))
    text(own / "pet" / pet.name.replace(".nii.gz", ".json"), json.dumps(SIDECAR))
    text(root / "dataset_description.json", '{"Name": "bids", "BIDSVersion": "1.8.0"}')
    text(root / "participants.tsv", "participant_id\tweight\nsub-01\t70\n")
    derived = root / "derivatives" / "reader" / "sub-01" / "ses-a" / "pet"
    mask(derived / f"{stem}_trc-18FFDG_label-tumor_mask.nii.gz")
    return 1, 1


LAYOUTS = {
    "FDG-PET-CT-Lesions": autopet,
    "autoPETIII": autopet_3,
    "hecktor2022": hecktor_22,
    "HECKTOR2025": hecktor_25,
    "HECKTOR2026": hecktor_26,
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
