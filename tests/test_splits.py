"""Folds: whole patients, equal images together, balanced, the same whatever the order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StageError
from common.hashing import pseudonym
from common.splits import (
    Sample,
    balanced_folds,
    equal_images,
    inseparable,
    patient_characters,
    project_folds,
)

PATIENT = 4

studies = st.dictionaries(
    st.tuples(st.integers(0, 40), st.integers(0, 3)).map(lambda k: f"{k[0]:04d}{k[1]}"),
    st.sampled_from(["lung", "lymphoma"]),
    min_size=12,
    max_size=80,
).filter(lambda projects: len({key[:PATIENT] for key in projects}) >= 5)


def samples_of(projects, digests=None):
    return [Sample(key, key[:5], project, (digests or {}).get(key, key))
            for key, project in projects.items()]  # fmt: skip


def validations(projects, n_folds):
    groups = inseparable(samples_of(projects), PATIENT)
    return [fold.validation for fold in balanced_folds(groups, n_folds)]


def unlabelled(keys):
    return dict.fromkeys(keys, "")


@given(studies, st.integers(2, 5))
def test_every_key_is_in_one_fold_and_patients_are_whole(projects, n_folds):
    folds = validations(projects, n_folds)
    assert len(folds) == n_folds
    assert sorted(key for fold in folds for key in fold) == sorted(projects)
    patients = [{key[:PATIENT] for key in fold} for fold in folds]
    assert sum(map(len, patients)) == len(set().union(*patients))
    assert all(folds)


@given(studies, st.integers(2, 5))
def test_a_fold_trains_on_all_that_it_does_not_validate_with(projects, n_folds):
    for fold in balanced_folds(inseparable(samples_of(projects), PATIENT), n_folds):
        assert sorted([*fold.train, *fold.validation]) == sorted(projects)
        assert [*fold.train] == sorted(fold.train)


@given(studies, st.integers(2, 5), st.randoms())
def test_order_of_keys_decides_nothing(projects, n_folds, random):
    shuffled = list(projects)
    random.shuffle(shuffled)
    other_order = {key: projects[key] for key in shuffled}
    assert validations(other_order, n_folds) == validations(projects, n_folds)


def test_adding_a_study_of_a_new_patient_leaves_one_study_patients_balanced():
    folds = validations(unlabelled(f"{number:04d}0" for number in range(23)), 5)
    assert sorted(map(len, folds)) == [4, 4, 5, 5, 5]


@given(st.integers(2, 5), st.integers(5, 40), st.integers(5, 40))
def test_projects_and_totals_are_spread_evenly(n_folds, n_lung, n_lymphoma):
    projects = {f"1{number:03d}0": "lung" for number in range(n_lung)}
    projects |= {f"2{number:03d}0": "lymphoma" for number in range(n_lymphoma)}
    folds = validations(projects, n_folds)
    for project in ("lung", "lymphoma"):
        counts = [Counter(projects[key] for key in fold)[project] for fold in folds]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, folds)) - min(map(len, folds)) <= 2


def test_large_patients_are_evened_out_by_small_ones():
    keys = [f"0001{n}" for n in range(6)] + [f"{patient:04d}0" for patient in range(2, 8)]
    assert sorted(map(len, validations(unlabelled(keys), 2))) == [6, 6]


def test_slices_of_a_study_stay_together():
    keys = [f"{patient:04d}0_{angle:03d}" for patient in range(6) for angle in range(0, 180, 45)]
    for fold in validations(unlabelled(keys), 3):
        assert len(fold) == 8


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(StageError, match=r"2 patients can't fill 3 folds"):
        validations(unlabelled(["00010", "00011", "00020"]), 3)


# --- equal images ----------------------------------------------------------------------------


@given(studies, st.data())
def test_patients_with_equal_images_are_on_one_side(projects, data):
    digests = {key: data.draw(st.integers(0, 60).map(str)) for key in projects}
    samples = samples_of(projects, digests)
    groups = inseparable(samples, PATIENT)
    assert sorted(s.key for group in groups for s in group) == sorted(projects)
    for one in range(len(groups)):
        for other in range(one):
            for what in (lambda s: s.key[:PATIENT], lambda s: s.digest):
                assert not {what(s) for s in groups[one]} & {what(s) for s in groups[other]}


def test_no_more_is_kept_together_than_must_be():
    """A shares a scan with B and B another with C; D and E share none."""
    keys = ["00010", "00020", "00021", "00030", "00040", "00050"]
    digests = {"00010": "x", "00020": "x", "00021": "y", "00030": "y"}
    groups = inseparable(samples_of(unlabelled(keys), digests), PATIENT)
    assert sorted(sorted(s.key for s in group) for group in groups) == [
        ["00010", "00020", "00021", "00030"],
        ["00040"],
        ["00050"],
    ]


def test_equal_images_are_named_once_a_study():
    pairs = [("00010", "x"), ("00020", "x"), ("00030", "z"), ("00011", "")]
    samples = [
        Sample(f"{study}_{angle}", study, "", digest and f"{digest}{angle}")
        for study, digest in pairs
        for angle in ("000", "090")
    ]
    assert equal_images(samples) == [["00010", "00020"]]


# --- a fold a project ------------------------------------------------------------------------


def test_a_fold_a_project_trains_on_the_others():
    projects = {"00010": "lung", "00020": "lung", "00030": "breast", "00040": "skin"}
    folds = project_folds(inseparable(samples_of(projects), PATIENT))
    assert [*folds] == ["breast", "lung", "skin"]
    assert [*folds["lung"].validation] == ["00010", "00020"]
    assert [*folds["lung"].train] == ["00030", "00040"]


def test_a_patient_of_two_projects_is_never_on_both_sides():
    projects = {"00010": "lung", "00011": "skin", "00020": "lung", "00030": "skin"}
    folds = project_folds(inseparable(samples_of(projects), PATIENT))
    assert ([*folds["lung"].train], [*folds["skin"].train]) == (["00030"], ["00020"])
    assert [*folds["lung"].validation, *folds["skin"].validation] == [
        "00010", "00020", "00011", "00030",
    ]  # fmt: skip


def test_one_project_can_not_be_left_out():
    with pytest.raises(StageError, match="one project alone"):
        project_folds(inseparable(samples_of({"00010": "lung", "00020": "lung"}), PATIENT))


# --- the patient's part of a hash ------------------------------------------------------------


def hashes(lengths, n_patients=3, n_visits=2):
    return [
        pseudonym(f"patient {patient}", f"visit {visit}", lengths=lengths)
        for patient in range(n_patients)
        for visit in range(n_visits)
    ]


def told(studies, number):
    return [Sample(study, study, patient_characters=number) for study in studies]


def test_the_file_says_how_long_the_patients_part_is():
    assert patient_characters(told(hashes((5, 5)), 5)) == 5
    assert patient_characters(told(hashes((12, 4)), 12)) == 12


def test_of_several_lengths_the_least_keeps_patients_whole():
    both = told(hashes((12, 4)), 12) + told(hashes((5, 5)), 5)
    assert patient_characters(both) == 5
    assert len(inseparable(both, 5)) == 3


def test_a_file_that_does_not_say_has_the_default_length_or_is_refused():
    assert patient_characters(told(hashes((7, 3), 40, 3), None)) == 7
    for studies in (hashes((12, 4)), hashes((5, 5)), hashes((4, 6)), ["lung_01", "lung_02"]):
        with pytest.raises(StageError, match="--patient-characters P"):
            patient_characters(told(studies, None))


def test_patients_whose_hashes_begin_alike_by_chance_are_of_the_default_length():
    """Of 2000 patients some two share their first five characters."""
    studies = hashes((7, 3), 2000, 1)
    assert len({study[:5] for study in studies}) < 2000
    assert patient_characters(told(studies, None)) == 7


@pytest.mark.parametrize(("asked", "number"), [(8, 7), (10, None), (7, 5)])
def test_more_characters_than_tell_the_patient_are_refused(asked, number):
    with pytest.raises(StageError, match=f"--patient-characters {asked}: study [0-9a-f]+ has at"):
        patient_characters(told(hashes((7, 3)), number), asked)


def test_fewer_characters_keep_more_together():
    assert patient_characters(told(hashes((7, 3)), 7), 3) == 3
    assert patient_characters(told(["lung_01", "lung_02"], None), 6) == 6
