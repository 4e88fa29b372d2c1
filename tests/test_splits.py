"""Folds: whole patients, balanced, the same whatever the order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StageError
from common.splits import patient_folds

PATIENT = 4

studies = st.dictionaries(
    st.tuples(st.integers(0, 40), st.integers(0, 3)).map(lambda k: f"{k[0]:04d}{k[1]}"),
    st.sampled_from(["lung", "lymphoma"]),
    min_size=12,
    max_size=80,
).filter(lambda projects: len({key[:PATIENT] for key in projects}) >= 5)


@given(studies, st.integers(2, 5))
def test_every_key_is_in_one_fold_and_patients_are_whole(projects, n_folds):
    folds = patient_folds(sorted(projects), projects, n_folds, PATIENT)
    assert len(folds) == n_folds
    assert sorted(key for fold in folds for key in fold) == sorted(projects)
    patients = [{key[:PATIENT] for key in fold} for fold in folds]
    assert sum(map(len, patients)) == len(set().union(*patients))
    assert all(folds)


@given(studies, st.integers(2, 5), st.randoms())
def test_order_of_keys_decides_nothing(projects, n_folds, random):
    shuffled = sorted(projects)
    random.shuffle(shuffled)
    one = patient_folds(sorted(projects), projects, n_folds, PATIENT)
    assert patient_folds(shuffled, dict(projects), n_folds, PATIENT) == one


def test_adding_a_study_of_a_new_patient_leaves_one_study_patients_balanced():
    keys = [f"{number:04d}0" for number in range(23)]
    folds = patient_folds(keys, {}, 5, PATIENT)
    assert sorted(map(len, folds)) == [4, 4, 5, 5, 5]


@given(st.integers(2, 5), st.integers(5, 40), st.integers(5, 40))
def test_projects_and_totals_are_spread_evenly(n_folds, n_lung, n_lymphoma):
    projects = {f"1{number:03d}0": "lung" for number in range(n_lung)}
    projects |= {f"2{number:03d}0": "lymphoma" for number in range(n_lymphoma)}
    folds = patient_folds(sorted(projects), projects, n_folds, PATIENT)
    for project in ("lung", "lymphoma"):
        counts = [Counter(projects[key] for key in fold)[project] for fold in folds]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, folds)) - min(map(len, folds)) <= 2


def test_large_patients_are_evened_out_by_small_ones():
    keys = [f"0001{n}" for n in range(6)] + [f"{patient:04d}0" for patient in range(2, 8)]
    folds = patient_folds(keys, {}, 2, PATIENT)
    assert sorted(map(len, folds)) == [6, 6]


def test_slices_of_a_study_stay_together():
    keys = [f"{patient:04d}0_{angle:03d}" for patient in range(6) for angle in range(0, 180, 45)]
    for fold in patient_folds(keys, {}, 3, PATIENT):
        assert len(fold) == 8


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(StageError, match=r"2 patients can't fill 3 folds"):
        patient_folds(["00010", "00011", "00020"], {}, 3, PATIENT)
