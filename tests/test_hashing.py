"""Pseudonyms and digests, held against published digests and the laws that they must keep."""

import hashlib
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.hashing import array_digest, fingerprint, pseudonym

KEY = b"sixteen bytes..."
laws = settings(deadline=None, derandomize=True, max_examples=60)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# --- pseudonyms ------------------------------------------------------------------------------


def test_pseudonym_is_made_of_the_published_sha256():
    """FIPS 180-2: SHA-256("abc") = ba7816bf...f20015ad."""
    assert pseudonym("abc", "abc") == "ba7816b" + "5ad"
    assert pseudonym("abc", "abc", lengths=(8, 8)) == "ba7816bf" + "f20015ad"


def test_keyed_pseudonym_is_made_of_the_published_hmac():
    """RFC 4231, test case 2."""
    question = "what do ya want for nothing?"
    assert pseudonym(question, question, b"Jefe", (16, 16)) == "5bdcc146bf60754e9dec58b964ec3843"


def test_patient_alone_decides_the_first_part_and_study_the_second():
    first, second = pseudonym("Weber", "2024-01"), pseudonym("Weber", "2024-02")
    other = pseudonym("Müller", "2024-01")
    assert first[:7] == second[:7] != other[:7]
    assert first[7:] == other[7:] != second[7:]


@laws
@given(names, names)
def test_composed_and_decomposed_spellings_are_one_name(patient, study):
    spellings = [
        pseudonym(unicodedata.normalize(form, patient), unicodedata.normalize(form, study), key)
        for form in ("NFC", "NFD")
        for key in (None, KEY)
    ]
    assert spellings[:2] == spellings[2:]


def test_spelling_matters_beyond_composition():
    assert len({pseudonym(name, "1") for name in ("Weber", "weber", "Weber ", "\uff37eber")}) == 4


@laws
@given(st.binary(min_size=1).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_every_name_that_a_folder_can_have_has_a_pseudonym(name):
    expected = hashlib.sha256(unicodedata.normalize("NFC", os.fsdecode(name)).encode(
        "utf-8", "surrogateescape")).hexdigest()  # fmt: skip
    assert pseudonym(os.fsdecode(name), "1", lengths=(64, 1))[:64] == expected


@laws
@given(names, names, st.integers(1, 64), st.integers(1, 64), st.none() | st.binary(min_size=16))
def test_longer_pseudonyms_extend_shorter_ones(patient, study, n_patient, n_study, key):
    shorter = pseudonym(patient, study, key, (n_patient, n_study))
    longest = pseudonym(patient, study, key, (64, 64))
    assert len(shorter) == n_patient + n_study
    assert longest.startswith(shorter[:n_patient])
    assert longest.endswith(shorter[n_patient:])


def test_key_changes_every_pseudonym():
    by_key = {pseudonym("Weber", "1", key) for key in (None, KEY, KEY[::-1], KEY + b"\0")}
    # HMAC pads keys with zero bytes, so the last two are one key.
    assert len(by_key) == 3


# --- fingerprints ----------------------------------------------------------------------------


def test_fingerprint_is_that_of_compact_ascii_json():
    text = b'{"a":[1,2.5,null],"\\u00e9":true}'
    assert fingerprint({"é": True, "a": [1, 2.5, None]}) == hashlib.sha256(text).hexdigest()


@laws
@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_key_order_does_not_matter(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


@laws
@given(json_values, json_values)
def test_different_values_have_different_fingerprints(one, other):
    # repr tells apart what == does not: 1, 1.0 and True, 0.0 and -0.0.
    same = repr(_in_order(one)) == repr(_in_order(other))
    assert (fingerprint(one) == fingerprint(other)) == same


def _in_order(value):
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(each) for each in value] if isinstance(value, list) else value


def test_names_that_are_no_text_have_fingerprints():
    assert fingerprint([os.fsdecode(b"\xff.dcm")]) != fingerprint([os.fsdecode(b"\xfe.dcm")])


# --- digests of arrays -----------------------------------------------------------------------

numbers = arrays.arrays(
    st.sampled_from(["u1", "u2", "<i2", ">i2", "<f2", "<f4", ">f8"]),
    arrays.array_shapes(min_dims=1, max_dims=4, max_side=4),
)


@laws
@given(numbers)
def test_digest_of_an_array_is_that_of_its_type_shape_and_bytes(array):
    plain = array.astype(array.dtype.newbyteorder("<"))
    label = f"{plain.dtype.str}{plain.shape}".encode()
    assert array_digest(array) == hashlib.sha256(label + plain.tobytes()).hexdigest()


@laws
@given(numbers)
def test_memory_layout_and_byte_order_do_not_matter(array):
    expected = array_digest(array)
    assert array_digest(np.asfortranarray(array)) == expected
    assert array_digest(array[::-1][::-1]) == expected
    assert array_digest(array.astype(array.dtype.newbyteorder("S"))) == expected


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((2, 3), "i2"),
        np.zeros((3, 2), "u2"),
        np.zeros(6, "u2"),
        np.zeros((2, 3, 1), "u2"),
        np.array([[0, 0, 0], [0, 0, 1]], "u2"),
    ],
)
def test_type_shape_and_every_value_matter(other):
    assert array_digest(other) != array_digest(np.zeros((2, 3), "u2"))
