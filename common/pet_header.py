"""PET headers: the attributes that decide the SUV, read into plain values for `common.suv`.

Knows pydicom.
"""

from collections.abc import Sequence

from pydicom.dataset import Dataset

from common.dicom_times import date_and_time, date_time, private_date_time, utc_offset
from common.dicom_values import number, private_number, tag_of, text, texts
from common.errors import StudyError
from common.pet_attributes import (
    DECAY_REFERENCE,
    PHILIPS_ACTIVITY_FACTOR,
    PHILIPS_SUV_FACTOR,
    common_fields,
    require_no_intercept,
    series_fields,
)
from common.pet_frames import series_of_frames
from common.pet_series import PetSeries, PetSlice

ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
LEGACY_CONVERTED_PET = "1.2.840.10008.5.1.4.1.1.128.1"


def read_pet_series(
    headers: Sequence[Dataset],
    tracer: int | None = None,
    frame_order: Sequence[tuple[int, int]] | None = None,
) -> PetSeries:
    """Read the headers of one PET series.

    Parameters
    ----------
    headers : sequence of pydicom.Dataset
        In slice order; or one that stands for all slices; or Enhanced PET objects.
    tracer : int, optional
        Which item of RadiopharmaceuticalInformationSequence to use, from 1; needed where there
        are several.
    frame_order : sequence of (int, int), optional
        Object and frame of each slice of Enhanced PET, from 0; as stored by default.

    Raises
    ------
    StudyError
        Not PET, a legacy-converted object, several tracers, a RescaleIntercept other than 0,
        malformed values, or headers that contradict each other.
    """
    if not headers:
        raise StudyError("no PET header: give the DICOM header of the PET series")
    for header in headers:
        _require_pet(header)
    are_enhanced = {text(header, "SOPClassUID") == ENHANCED_PET for header in headers}
    if len(are_enhanced) > 1:
        raise StudyError(
            f"single images and multi-frame objects in one PET series ({tag_of('SOPClassUID')}): "
            "give the one or the other"
        )
    if are_enhanced == {True}:
        return series_of_frames(headers, tracer, frame_order)
    fields = common_fields(series_fields(header, tracer) for header in headers)
    filenames = [str(getattr(header, "filename", None) or "") for header in headers]
    return PetSeries(
        slices=tuple(_slice(header, fields["manufacturer"]) for header in headers),
        corrected_image=frozenset.intersection(*map(_corrections, headers)),
        first_file=filenames.index(min(filenames)),
        **fields,
    )


def _require_pet(header: Dataset) -> None:
    if text(header, "Modality") != "PT":
        raise StudyError(
            f"the header is not one of a PET ({tag_of('Modality')} is not PT): "
            "give a header of the PET series"
        )
    if text(header, "SOPClassUID") == LEGACY_CONVERTED_PET:
        raise StudyError(
            f"legacy-converted PET lacks what SUV needs ({tag_of('SOPClassUID')}): "
            "give the original single-frame series"
        )


def _slice(header: Dataset, manufacturer: str) -> PetSlice:
    require_no_intercept(header)
    zone = utc_offset(header)
    acquired = date_and_time(header, "AcquisitionDate", "AcquisitionTime", zone)
    stated = DECAY_REFERENCE.get(manufacturer)
    by_philips = manufacturer == "PHILIPS"
    return PetSlice(
        acquisition=acquired or date_time(header, "AcquisitionDateTime", zone),
        frame_reference_time_s=_seconds(header, "FrameReferenceTime"),
        frame_duration_s=_seconds(header, "ActualFrameDuration"),
        decay_reference=private_date_time(header, stated, zone) if stated else None,
        philips_suv_factor=private_number(header, PHILIPS_SUV_FACTOR) if by_philips else None,
        philips_activity_factor=(
            private_number(header, PHILIPS_ACTIVITY_FACTOR) if by_philips else None
        ),
    )


def _corrections(header: Dataset) -> frozenset[str]:
    return frozenset(each.upper() for each in texts(header, "CorrectedImage"))


def _seconds(header: Dataset, keyword: str) -> float | None:
    milliseconds = number(header, keyword)
    return None if milliseconds is None else milliseconds / 1000
