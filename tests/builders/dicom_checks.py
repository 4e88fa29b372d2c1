"""What the tests of CT and PET series ask of a folder of files."""

import re

import numpy as np
import pytest
from dicom_builders import affine_of, build_slices, noise, read_series
from pydicom import uid

from common.dicom.pixels import read_ct, read_pet
from common.dicom.series import stack_slices
from common.errors import StudyError

SHAPE = (7, 5, 6)
ENCODABLE = (48, 40, 3)  # JPEG 2000 takes more than a few pixels
CANARY = "CANARY"
SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "RLE": uid.RLELossless,
    "JPEG lossless": uid.JPEGLossless,
    "JPEG lossless SV1": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000": uid.JPEG2000Lossless,
}


class NotOneCandidate(Exception):
    """A folder holds no candidate, or several."""


def read_image(folder, modality="CT", factors=1.0):
    """Return the only candidate of a folder as an image."""
    series = read_series(folder, modality)
    if len(series) != 1:
        raise NotOneCandidate(len(series))
    stack = stack_slices(*series)
    if modality == "CT":
        return read_ct(stack)
    return read_pet(stack, np.broadcast_to(factors, stack.shape[2]))


def refusal(folder, modality="CT"):
    """Return why a folder is refused, in words without any from its headers or paths."""
    with pytest.raises(StudyError) as refused:
        read_image(folder, modality)
    message = str(refused.value)
    assert CANARY not in message
    assert str(folder) not in message
    assert not re.search(r"IM\d{4}", message)
    return message


def reason(folder):
    """Return why a folder is refused; empty where it is not."""
    try:
        read_image(folder)
    except StudyError as error:
        return str(error)
    return ""


def slices(stored=None, affine=None, modality="CT", **options):
    """Build slices whose every free text is a canary."""
    stored = noise(SHAPE) if stored is None else stored
    named = dict.fromkeys(("PatientName", "PatientID", "SeriesDescription", "StudyID"), CANARY)
    return build_slices(
        stored, affine_of() if affine is None else affine, modality, **named, **options
    )


def assert_image_is(image, values, affine, dtype):
    assert image.data.dtype == dtype
    assert image.data.flags.f_contiguous
    np.testing.assert_allclose(image.data, values, rtol=1e-7)
    assert image.extremes == (image.data.min(), image.data.max())
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
