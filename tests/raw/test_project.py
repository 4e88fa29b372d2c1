"""Studies, and which file plays which role: by Modality, by words, by the user's patterns."""

import itertools
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import layouts
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pet_headers import PerSlice

from common.dicom.files import DicomFile, Series
from common.errors import IncompleteStudy, Kind, StageError, StudyError, Warning
from common.hashing import pseudonym
from common.raw.candidates import NiftiFile, Patterns
from common.raw.project import StudyFolder, list_files, list_studies
from common.raw.roles import choose, find_roles, survey
from common.raw.words import roles_by_words

WORDS = {
    "ct": ["ct", "gk"],
    "pet": ["pet", "pt", "suv"],
    "mask": ["mask", "seg", "label", "roi", "gtv"],
}
WORD_AND_ROLE = [(word, role) for role, words in WORDS.items() for word in words]


def roles_of(study, header_needed=True, **patterns):
    return find_roles(str(study), Patterns(patterns), header_needed=header_needed)


def left_out(text):
    return (Warning(Kind.LEFT_OUT, text),)


def refusal(study, **patterns):
    """The error that a study ends in; its public text holds no identity."""
    with pytest.raises(StudyError) as caught:
        roles_of(study, **patterns)
    assert not any(part in str(caught.value) for part in layouts.IDENTITY)
    assert str(study) not in str(caught.value)
    return caught.value


def names(candidate):
    if isinstance(candidate, Series):
        return sorted(file.name for file in candidate.files)
    return [candidate.name]


# --- studies ---------------------------------------------------------------------------------


def test_studies_are_listed_by_patient_and_study(tmp_path):
    for folder in ("b/2", "b/1", "a/3", "a/.hidden", ".git/x", "__MACOSX/b", "b/@eaDir"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    found = list_studies(tmp_path)
    assert [(each.patient, each.study) for each in found] == [("a", "3"), ("b", "1"), ("b", "2")]
    assert found[0].path == str(tmp_path / "a" / "3")


def test_what_interrupted_runs_left_in_the_project_is_no_patient(tmp_path):
    for folder in ("a/1", "project.zip.parts/x", "all_3d.h5.parts"):
        (tmp_path / folder).mkdir(parents=True)
    assert [each.patient for each in list_studies(tmp_path)] == ["a"]


def test_names_are_the_same_whatever_the_locale(tmp_path):
    """A pseudonym is made of them, and composed and decomposed accents are one name."""
    (tmp_path / "raw" / unicodedata.normalize("NFD", "Zo\u00eb") / "\u8b0e").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from common.raw.pseudonyms import studies_by_hash\n"
        "print(*studies_by_hash(Path(sys.argv[1]), None, (7, 3)))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "raw"],
            cwd=Path(__file__).parents[2],
            env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for utf8 in ("0", "1")
    ]
    assert said == [pseudonym("Zo\u00eb", "\u8b0e")] * 2


@pytest.mark.parametrize("content", [(), ("patient.zip",), ("patient/ct.nii.gz",)])
def test_a_project_without_studies_says_what_it_must_hold(tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(StageError, match="must hold <patient>/<study>/"):
        list_studies(tmp_path)


def test_a_patient_without_a_study_folder_is_listed_and_skipped(tmp_path):
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    layouts.write_nifti_images(tmp_path / "b")
    lost = list_studies(tmp_path)[1]
    assert lost == StudyFolder("b", "", str(tmp_path / "b"))
    with pytest.raises(IncompleteStudy, match="no study folder: move the patient"):
        list_files(lost)


@pytest.mark.parametrize("where", ["b", "b/2"])
def test_a_folder_without_permission_fails_alone(tmp_path, monkeypatch, where):
    for folder in ("a/1", "b/2"):
        (tmp_path / folder).mkdir(parents=True)
    scan = os.scandir

    def forbidding(folder):
        if str(folder) == str(tmp_path / where):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", forbidding)
    found = list_studies(tmp_path)
    assert [each.patient for each in found] == ["a", "b"]
    assert list_files(found[0]) == []
    with pytest.raises(StudyError, match=r"cannot be read \(Permission denied\)") as caught:
        list_files(found[1])
    assert not isinstance(caught.value, IncompleteStudy)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("where", ["b", "a/2"])
def test_a_study_behind_a_dangling_link_fails_alone(tmp_path, where):
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / where).symlink_to(tmp_path / "nowhere")
    _, lost = list_studies(tmp_path)
    with pytest.raises(StudyError, match="No such file"):
        list_files(lost)


def test_loops_of_links_end(tmp_path):
    study = tmp_path / "a" / "1"
    study.mkdir(parents=True)
    (study / "ct.nii").write_text("x")
    (study / "self").symlink_to(study)
    (study / "x").symlink_to(study / "y")
    (study / "y").symlink_to(study / "x")
    files = {file.name: file.size for file in list_files(list_studies(tmp_path)[0])}
    assert files == {"ct.nii": 1, "x": None, "y": None}


@pytest.mark.parametrize("linked", [False, True])
def test_a_link_to_a_folder_above_never_leads_to_other_patients(tmp_path, linked):
    # A study took the files of all others for its own, and the project itself was a patient.
    raw = tmp_path / "raw"
    for patient in ("a", "b"):
        (raw / patient / "1").mkdir(parents=True)
        (raw / patient / "1" / f"{patient}.nii").write_text("")
    if linked:
        (tmp_path / "archive").mkdir()
        (tmp_path / "archive" / "other.nii").write_text("")
        (raw / "a" / "1").rename(tmp_path / "archive" / "1")
        (raw / "a" / "1").symlink_to(tmp_path / "archive" / "1")
        (raw / "a" / "1" / "archive").symlink_to(tmp_path / "archive")
    (raw / "a" / "1" / "up").symlink_to(raw)
    (raw / "a" / "2").symlink_to(raw / "a")
    (raw / "c").symlink_to(raw)
    (raw / "d").symlink_to(tmp_path)
    found = list_studies(raw)
    assert [(each.patient, each.study) for each in found] == [("a", "1"), ("b", "1")]
    assert [file.name for file in list_files(found[0])] == ["a.nii"]


def test_files_have_what_tells_that_they_changed(tmp_path):
    path = tmp_path / "a" / "1" / "deep" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    (path.parent / ".DS_Store").write_text("")
    os.mkfifo(path.parent / "pipe")
    os.utime(path, ns=(1, 123_456_789))
    (file,) = list_files(list_studies(tmp_path)[0])
    assert (file.name, file.size, file.changed_ns) == ("deep/x", 5, 123_456_789)


# --- roles by words --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("CT.nii.gz", {"ct"}),
        ("a/b/PET/x.nii", {"pet"}),
        ("PET/CT.nii.gz", {"ct"}),
        ("CT/lesion_mask.nii.gz", {"mask"}),
        ("SUV_seg.nii.gz", {"mask"}),
        ("CT_gtv.nii.gz", {"mask"}),
        ("GK p.v. 3.nii.gz", {"ct"}),
        ("Läsion-SEG.NII.GZ", {"mask"}),
        # PET/CT names the examination, not a role.
        ("PET-CT_0001_CT.nii.gz", {"ct"}),
        ("x_PET_CT_PET.nii.gz", {"pet"}),
        ("PETCT_0011f3deaf/pt.nii", {"pet"}),
        ("PET_CT.nii.gz", set()),
        ("PET_CT/CT.nii.gz", {"ct"}),
        # Either may be meant: the user has to say.
        ("CT_to_PET.nii.gz", {"ct", "pet"}),
        ("PT_01_CT.nii.gz", {"ct", "pet"}),
        # Whole words only.
        ("CTres.nii.gz", set()),
        ("petite.nii.gz", set()),
        ("segmentation.nii.gz", set()),
        ("ct1.nii.gz", set()),
    ],
)
def test_words_tell_roles(name, roles):
    assert roles_by_words(name) == roles


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(WORD_AND_ROLE),
    st.lists(st.sampled_from(["1", "x", "st", "0001", "wb"]), max_size=3),
    st.sampled_from(["_", "-", " ", ".", "__", "+"]),
    st.integers(0, 3),
    st.sampled_from(["", "other/", "p.1/"]),
)
def test_a_word_tells_its_role_whatever_its_case_and_company(
    word_and_role, others, between, place, folder
):
    word, role = word_and_role
    name = between.join([*others[:place], word, *others[place:]])
    for cased in (name, name.upper(), name.title()):
        assert roles_by_words(f"{folder}{cased}.nii.gz") == {role}
    assert not roles_by_words(f"{folder}x{word}x.nii")


# --- layouts ---------------------------------------------------------------------------------

LAYOUTS = {
    layouts.subfolders: (Series, Series, DicomFile),
    layouts.tcia: (Series, Series, DicomFile),
    layouts.flat: (Series, Series, DicomFile),
    layouts.nifti_mask_beside_dicom: (Series, Series, NiftiFile),
    layouts.nifti_with_header: (NiftiFile, NiftiFile, NiftiFile),
    layouts.nifti_with_header_series: (NiftiFile, NiftiFile, NiftiFile),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_are_recognised_as_they_are(tmp_path, layout):
    found = roles_of(layout(tmp_path))
    assert (type(found.ct), type(found.pet), type(found.mask)) == LAYOUTS[layout]
    for image in (found.ct, found.pet):
        assert not isinstance(image, Series) or image.n_images == layouts.N_SLICES
    assert (found.header is None) == isinstance(found.pet, Series)
    assert found.warnings == ()


def test_autopet_is_chosen_by_its_patterns(tmp_path):
    study = layouts.autopet(tmp_path)
    found = roles_of(study, header_needed=False, ct="*CTres*", pet="*SUV*")
    assert [names(x) for x in (found.ct, found.pet, found.mask)] == [
        ["CTres.nii.gz"],
        ["SUV.nii.gz"],
        ["SEG.nii.gz"],
    ]
    assert found.header is None
    assert "no DICOM header" in str(refusal(study, ct="*CTres*", pet="*SUV*"))


def test_localizers_and_screen_saves_are_no_candidates(tmp_path):
    found = roles_of(layouts.flat(tmp_path))
    assert all(name.endswith("A") for name in names(found.ct))
    assert all(name.endswith("B") for name in names(found.pet))


# --- several candidates ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_scout"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, True),
        ({"PixelSpacing": [1, 1]}, True),
        ({}, False),
        ({"SeriesInstanceUID": ""}, False),
    ],
)
def test_a_single_slice_is_no_second_ct_unless_it_may_be_torn_from_the_first(
    tmp_path, change, is_scout
):
    study = layouts.subfolders(tmp_path)
    extra = pydicom.dcmread(study / "CT" / "pet_005.dcm")
    extra.SeriesInstanceUID, extra.ImageType = "1.2.826.77", ["ORIGINAL", "PRIMARY"]
    for keyword, value in change.items():
        setattr(extra, keyword, value)
    extra.save_as(study / "CT" / "extra")
    if is_scout:
        found = roles_of(study)
        assert found.ct.n_images == layouts.N_SLICES
        assert found.warnings == left_out("DICOM series of one CT slice (1) are left out")
    else:
        assert "2 candidates for CT (DICOM series of 1; DICOM" in str(refusal(study))


def with_second_ct(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(study / "more" / "CT2", SeriesInstanceUID="1.9", SeriesDescription="lung Doe")
    return study


def with_second_pet(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "NAC", SeriesInstanceUID="1.9", SeriesDescription="PET uncorr. Doe")
    return study


def with_second_mask(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_rtstruct(study / "RS_reader2.dcm", SeriesDescription="second reader Doe")
    return study


@pytest.mark.parametrize(
    ("make", "message", "private"),
    [
        (
            with_second_ct,
            "2 candidates for CT (DICOM series of 6; DICOM series of 6): choose with --ct PATTERN",
            "lung Doe | more/CT2/pet_000.dcm",
        ),
        (
            with_second_pet,
            "2 candidates for PET (DICOM series of 6, ATTN yes; DICOM series of 6, ATTN yes): "
            "choose with --pet PATTERN",
            "PET: DICOM series of 6, ATTN yes: PET uncorr. Doe | NAC/pet_000.dcm",
        ),
        (
            with_second_mask,
            "2 candidates for mask (DICOM RTSTRUCT; DICOM RTSTRUCT): choose with --mask PATTERN",
            "second reader Doe | RS_reader2.dcm",
        ),
    ],
)
def test_none_of_several_is_picked_silently(tmp_path, make, message, private):
    error = refusal(make(tmp_path))
    assert str(error) == f"{message}; the mapping file names them"
    assert private in error.private


def test_many_candidates_are_counted_by_kind(tmp_path):
    # An anonymiser that gives each slice a series of its own made a line of hundreds.
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(
        study / "CT", SeriesInstanceUID=PerSlice(*(f"1.9.{k}" for k in range(layouts.N_SLICES)))
    )
    assert str(refusal(study)).startswith(
        "6 candidates for CT (6 x DICOM series of 1): choose with --ct PATTERN, or, if "
        "SeriesInstanceUID (0020,000E) was changed slice by slice, export the series again; "
    )


@pytest.mark.parametrize(
    ("make", "role", "pattern", "chosen"),
    [
        (with_second_ct, "ct", "lung*", "more/CT2"),
        (with_second_ct, "ct", "more/*", "more/CT2"),
        (with_second_ct, "ct", "more/CT2", "more/CT2"),
        (with_second_ct, "ct", "more/CT2/", "more/CT2"),
        (with_second_ct, "ct", "CT/*", "CT"),
        (with_second_ct, "ct", "CT/pet_000.dcm", "CT"),
        (with_second_ct, "ct", "GK*", "CT"),
        (with_second_pet, "pet", "*[!n]corr*", "PET"),
        (with_second_pet, "pet", "NAC", "NAC"),
        (with_second_mask, "mask", "second*", "RS_reader2.dcm"),
        (with_second_mask, "mask", "MASK", "MASK"),
    ],
)
def test_a_pattern_on_path_or_description_decides(tmp_path, make, role, pattern, chosen):
    found = getattr(roles_of(make(tmp_path), **{role: pattern}), role)
    assert names(found)[0].startswith(chosen)


def test_a_pattern_tells_corrected_from_uncorrected(tmp_path):
    # "*AC*" fits both.
    study = layouts.subfolders(tmp_path)
    shutil.rmtree(study / "PET")
    for uid, name in (("1.8", "PET WB NAC"), ("1.9", "PET WB AC")):
        layouts.write_pet(study / uid, SeriesInstanceUID=uid, SeriesDescription=name)
    assert "2 candidates for PET" in str(refusal(study, pet="*AC*"))
    assert names(roles_of(study, pet="*[!N]AC*").pet)[0].startswith("1.9")


UNCORRECTED = ["NORM", "DTIM", "DECY", "RAN"]


def uncorrected(study, **attributes):
    """Add the series without attenuation correction, which no clinical study is without."""
    attributes = {"CorrectedImage": UNCORRECTED} | attributes
    layouts.write_pet(study / "NAC", SeriesInstanceUID="1.9", **attributes)
    return study


@pytest.mark.parametrize(
    "attributes",
    [{}, {"CorrectedImage": None}, {"CorrectedImage": PerSlice("DECY", *[["ATTN", "DECY"]] * 5)}],
)
def test_an_uncorrected_series_is_no_rival_of_a_corrected_one(tmp_path, attributes):
    found = roles_of(uncorrected(layouts.subfolders(tmp_path), **attributes))
    assert {name.split("/")[0] for name in names(found.pet)} == {"PET"}
    assert found.warnings == left_out(
        "PET series not corrected for attenuation (1, CorrectedImage (0028,0051) lacks ATTN, or is "
        "missing) are left out"
    )


def test_an_uncorrected_series_alone_or_named_is_taken_and_refused_later(tmp_path):
    study = uncorrected(layouts.subfolders(tmp_path))
    assert names(roles_of(study, pet="NAC").pet)[0].startswith("NAC")
    shutil.rmtree(study / "PET")
    found = roles_of(study)
    assert names(found.pet)[0].startswith("NAC")
    assert found.warnings == ()


def test_candidates_are_told_apart_by_slices_and_attenuation_correction(tmp_path):
    study = with_second_pet(tmp_path)
    for number, corrections in enumerate((UNCORRECTED, None)):
        layouts.write_pet(
            study / f"NAC{number}",
            SeriesInstanceUID=f"1.1{number}",
            SeriesDescription="Doe",
            CorrectedImage=corrections,
        )
    error = refusal(study)
    assert "2 candidates for PET (DICOM series of 6, ATTN yes; DICOM" in str(error)
    assert "ATTN no" not in error.private
    error = refusal(study, pet="Doe")
    assert "(DICOM series of 6, ATTN no; DICOM series of 6, ATTN unknown)" in str(error)
    assert "PET: DICOM series of 6, ATTN no: Doe | NAC0/pet_000.dcm" in error.private


@pytest.mark.parametrize("modality", ["NM", "PET"])
def test_a_pet_by_another_modality_is_hinted_at(tmp_path, modality):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", Modality=modality)
    assert (
        f"no PET; DICOM files (6) have Modality (0008,0060) {modality}, a PET has PT: if they are "
        "PET, correct it"
    ) in str(refusal(study))


def test_an_empty_modality_is_hinted_at(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", Modality="")
    assert "no PET; DICOM files (6) have an empty Modality (0008,0060)" in str(refusal(study))


def test_the_case_of_a_pattern_counts(tmp_path):
    assert "no CT; --ct fits no candidate" in str(refusal(with_second_ct(tmp_path), ct="LUNG*"))


def test_a_pattern_that_fits_nothing_is_told_with_what_there_was(tmp_path):
    error = refusal(with_second_pet(tmp_path), pet="*AC_WB*")
    assert isinstance(error, IncompleteStudy)
    assert str(error).startswith("no PET; --pet fits no candidate")
    assert "PET corr. Doe" in error.private
    assert "PET uncorr. Doe" in error.private


def test_a_pattern_may_name_what_no_word_tells(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    (study / "MASK.nii.gz").rename(study / "Läsionen.nii.gz")
    found = roles_of(study, header_needed=False, mask="Läs*")
    assert names(found.mask) == ["Läsionen.nii.gz"]


def test_a_nifti_file_that_no_word_tells_is_not_lost_silently(tmp_path):
    # "mask2" is no word for a mask: its tumours were missing, and nothing was said.
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    shutil.copy(study / "MASK.nii.gz", study / "mask2.nii.gz")
    found = roles_of(study, header_needed=False)
    assert names(found.mask) == ["MASK.nii.gz"]
    assert found.warnings == left_out(
        "NIfTI files (1) have no word for a role in their path and are left out: if one is meant, "
        "choose it by pattern"
    )


@pytest.mark.parametrize(("on_disk", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_patterns_and_paths_may_spell_accents_differently(tmp_path, on_disk, typed):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    name = unicodedata.normalize(on_disk, "Läsionen.nii.gz")
    (study / "MASK.nii.gz").rename(study / name)
    pattern = unicodedata.normalize(typed, "Läs*")
    assert names(roles_of(study, header_needed=False, mask=pattern).mask) == [name]


def test_a_file_that_another_pattern_names_is_no_candidate(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    layouts.write_nifti(study / "second_seg.nii.gz", layouts.LABELS)
    (study / "CT.nii.gz").rename(study / "seg_me.nii.gz")
    found = roles_of(study, header_needed=False, mask="second*", ct="seg_me*")
    assert names(found.ct) == ["seg_me.nii.gz"]
    assert names(found.mask) == ["second_seg.nii.gz"]


def test_several_examinations_in_one_study_are_told(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(study / "CT2", SeriesInstanceUID="1.9", StudyInstanceUID="1.8")
    assert "files are of 2 examinations (StudyInstanceUID (0020,000D))" in str(refusal(study))


# --- missing roles ---------------------------------------------------------------------------

PARTS = {"CT": "CT", "PET": "PET", "MASK": "mask"}


@pytest.mark.parametrize(
    "lost", [c for n in (1, 2, 3) for c in itertools.combinations(PARTS, n)], ids="+".join
)
def test_an_incomplete_study_lists_what_is_missing(tmp_path, lost):
    study = layouts.subfolders(tmp_path)
    for folder in lost:
        shutil.rmtree(study / folder)
    error = refusal(study)
    assert isinstance(error, IncompleteStudy)
    assert str(error) == ", ".join(f"no {PARTS[folder]}" for folder in lost)


def test_a_nifti_pet_needs_a_header_unless_it_is_suv(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    error = refusal(study)
    assert isinstance(error, IncompleteStudy)
    assert str(error) == (
        "no DICOM header; give one DICOM file of the PET, or --pet-units suv if its values are SUV"
    )
    assert roles_of(study, header_needed=False).header is None


def test_an_incomplete_study_tells_of_several_candidates_too(tmp_path):
    study = with_second_ct(tmp_path)
    shutil.rmtree(study / "MASK")
    assert str(refusal(study)).startswith("no mask; 2 candidates for CT")


@pytest.mark.parametrize(
    ("instead", "hint"),
    [
        ("reader.nii.gz", "NIfTI files (1) have no word for a role in their path: choose with"),
        ("tumor.nrrd", ".nrrd files are not read: convert or unpack them"),
        ("masks.zip", ".zip files are not read"),
        ("RS.dcm.gz", ".gz files are not read"),
        ("RS.dcm", "files named as DICOM (1) are left out, damaged or without Modality"),
    ],
)
def test_a_missing_mask_is_told_with_what_may_have_been_it(tmp_path, instead, hint):
    study = layouts.subfolders(tmp_path)
    (study / "MASK" / "RS.dcm").rename(study / instead)
    (study / instead).write_bytes(b"no DICOM at all" * 100)
    error = refusal(study)
    assert str(error).startswith("no mask; ")
    assert hint in str(error)


def test_images_that_are_no_slices_are_told(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(study / "CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert str(refusal(study)) == (
        "no CT; DICOM files (6) of Modality (0008,0060) CT are localizers, screen saves, "
        "reformats or maps: export the original series"
    )


@pytest.mark.parametrize("name", ["CT", "pt", "Mask"])
def test_a_missing_level_of_folders_is_told(tmp_path, name):
    layouts.write_ct(tmp_path / "patient" / name)
    assert "the study's folder is named like a role" in str(refusal(tmp_path / "patient" / name))


@pytest.mark.parametrize("name", ["2001-01-01 PET-CT", "study 1", "PETCT"])
def test_an_ordinary_name_of_a_study_is_not_blamed(tmp_path, name):
    (tmp_path / name).mkdir()
    assert str(refusal(tmp_path / name)) == "no CT, no PET, no mask"


# --- what is left out ------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(500)], ids=["empty", "short", "zeros"])
def test_a_slice_at_the_end_that_is_empty_fails_its_study(tmp_path, content):
    study = layouts.subfolders(tmp_path)
    (study / "PET" / "pet_005.dcm").write_bytes(content)
    assert str(refusal(study)).startswith("a DICOM file is damaged")


def test_a_file_named_as_dicom_that_is_none_is_not_lost_silently(tmp_path):
    study = layouts.subfolders(tmp_path)
    (study / "PET" / "pet_005.dcm").write_text("<html>404</html>" * 20)
    found = roles_of(study)
    assert found.pet.n_images == layouts.N_SLICES - 1
    assert "check that no slice is lost" in str(found.warnings[0])


def test_a_link_that_leads_nowhere_is_not_lost_silently(tmp_path):
    study = layouts.subfolders(tmp_path)
    (study / "PET" / "pet_006.dcm").symlink_to(tmp_path / "nowhere")
    assert roles_of(study).warnings == left_out(
        "links that lead nowhere (1) are left out: restore their target"
    )


def test_junk_without_a_dicom_name_is_no_matter(tmp_path):
    study = layouts.subfolders(tmp_path)
    for name in ("Thumbs.db", "VERSION", "viewer.exe", "autorun.inf"):
        (study / "PET" / name).write_bytes(b"\0" * 200)
    assert roles_of(study).warnings == ()


# --- headers ---------------------------------------------------------------------------------


def test_a_dicom_pet_beside_a_nifti_pet_is_its_header_and_this_is_said(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    layouts.write_pet(study / "dicom")
    found = roles_of(study)
    assert isinstance(found.pet, NiftiFile)
    assert found.header.n_images == layouts.N_SLICES
    text = (
        "the NIfTI file is taken as the PET and the DICOM series of 6 as its header: if the "
        "series is meant, choose it with --pet PATTERN"
    )
    assert found.warnings == (Warning(Kind.SERIES, text),)
    chosen = roles_of(study, pet="PET corr*")
    assert isinstance(chosen.pet, Series)
    assert chosen.header is None


def test_of_several_series_beside_a_nifti_pet_none_is_picked_as_header(tmp_path):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_pet(study / "other", SeriesInstanceUID="1.9", SeriesDescription="other Doe")
    error = refusal(study)
    assert "2 candidates for DICOM header (DICOM series of 1, ATTN yes; DICOM" in str(error)
    assert "other Doe" in error.private
    assert names(roles_of(study, header="PET_header*").header) == ["PET_header.dcm"]


@pytest.mark.parametrize("name", ["HEADER/1.dcm", "dicom-header.dcm", "pet header"])
def test_a_header_beside_a_dicom_pet_is_no_slice_of_it(tmp_path, name):
    study = layouts.subfolders(tmp_path)
    (study / name).parent.mkdir(exist_ok=True)
    shutil.copy(study / "PET" / "pet_002.dcm", study / name)
    found = roles_of(study)
    assert found.pet.n_images == layouts.N_SLICES
    assert names(found.header) == [name]


def test_a_header_beside_a_dicom_pet_may_be_named_by_pattern(tmp_path):
    study = layouts.subfolders(tmp_path)
    shutil.copy(study / "PET" / "pet_002.dcm", study / "PET" / "info.dcm")
    found = roles_of(study, header="*info*")
    assert (found.pet.n_images, names(found.header)) == (layouts.N_SLICES, ["PET/info.dcm"])


@pytest.mark.parametrize("name", ["info.dcm", "DICOMHEADER/1", "PET/x/1.dcm", "a/b/c.dcm"])
def test_a_copy_of_a_slice_in_another_folder_is_a_header(tmp_path, name):
    study = layouts.subfolders(tmp_path)
    (study / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(study / "PET" / "pet_002.dcm", study / name)
    found = roles_of(study)
    assert (found.pet.n_images, names(found.header)) == (layouts.N_SLICES, [name])


def test_headers_of_the_ct_are_no_slices_of_it(tmp_path):
    # One header each of CT and PET in one folder made the CT a series with a slice twice.
    study = layouts.subfolders(tmp_path)
    (study / "DICOM header").mkdir()
    for role in ("CT", "PET"):
        shutil.copy(study / role / "pet_002.dcm", study / "DICOM header" / role)
    found = roles_of(study)
    assert (found.ct.n_images, found.pet.n_images) == (layouts.N_SLICES, layouts.N_SLICES)
    assert names(found.header) == ["DICOM header/PET"]


@pytest.mark.parametrize(
    ("name", "warnings"),
    [("CT_header.dcm", ()), ("info/1", left_out("DICOM series of one CT slice (1) are left out"))],
)
def test_a_header_of_the_ct_beside_a_nifti_ct_is_no_second_ct(tmp_path, name, warnings):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_ct(tmp_path / "elsewhere")
    (study / name).parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "elsewhere" / "pet_002.dcm", study / name)
    found = roles_of(study)
    assert isinstance(found.ct, NiftiFile)
    assert found.warnings == warnings


def with_other_series(study):
    layouts.write_pet(study / "NAC", SeriesInstanceUID="1.9")
    shutil.copytree(study / "PET", study / "copy")


def with_parts_numbered_alike(study):
    for place, n_lost in (("PET", 3), ("rest", 2)):
        layouts.write_pet(study / place, SOPInstanceUID=PerSlice(*"123456"))
        for path in sorted((study / place).iterdir())[-n_lost:]:
            path.unlink()
    for k, path in enumerate(sorted((study / "rest").iterdir())):
        header = pydicom.dcmread(path)
        header.ImagePositionPatient[2] = 4 * (3 + k)
        header.save_as(path)


def with_three_copies_each_of_a_part(study):
    shutil.copytree(study / "PET", study / "a")
    shutil.copytree(study / "PET", study / "b")
    for place, k in (("PET", 0), ("a", 1), ("b", 2)):
        (study / place / f"pet_{k:03d}.dcm").unlink()


@pytest.mark.parametrize(
    ("copy", "n_images"),
    [
        (lambda study: shutil.copy(study / "PET/pet_002.dcm", study / "PET/again.dcm"), [7]),
        (lambda study: shutil.copytree(study / "PET", study / "copy"), [12]),
        (lambda study: shutil.copytree(study / "PET", study / "PET" / "copy"), [12]),
        (with_other_series, [6, 12]),
        (with_three_copies_each_of_a_part, [10]),
        (with_parts_numbered_alike, [7]),
    ],
    ids=["in it", "of all", "of all below", "of all, two series", "of parts", "by number alone"],
)
def test_other_copies_stay_slices_of_the_series_which_is_refused(tmp_path, copy, n_images):
    study = layouts.subfolders(tmp_path)
    copy(study)
    found = survey(str(study), Patterns()).fitting
    assert sorted(each.n_images for each in found["pet"]) == n_images
    assert "header" not in found or n_images == [10]


def test_a_pet_whose_every_file_is_named_a_header_is_the_pet(tmp_path):
    study = layouts.subfolders(tmp_path)
    (study / "PET").rename(study / "PET with header")
    found = roles_of(study)
    assert found.pet.n_images == layouts.N_SLICES
    assert found.header is None
    assert roles_of(study, header="PET*").header is None


# --- the survey ------------------------------------------------------------------------------


def test_a_survey_tells_in_words_what_fits(tmp_path):
    study = with_second_ct(tmp_path)
    (study / "MASK" / "RS.dcm").unlink()
    found = survey(str(study), Patterns())
    cells = [found.summary(role) for role in ("ct", "pet", "mask", "header")]
    assert cells == ["2 candidates", "DICOM series of 6", "missing", "-"]
    with pytest.raises(IncompleteStudy):
        choose(found)
