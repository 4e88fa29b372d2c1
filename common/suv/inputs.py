"""What the headers of one PET series say, as plain values, and the caveats about them.

Pure. Values are as the header has them: checked and reinterpreted only by the rules of this room.
"""

from dataclasses import dataclass, field
from datetime import datetime, time
from enum import Enum, auto

from common.errors import StudyError, Warning

# --- caveats ---------------------------------------------------------------------------------


@dataclass
class Caveats:
    """What of a header is taken otherwise, or is odd; none of it says who or when.

    Not frozen: each rule that a series goes by adds its own.

    Attributes
    ----------
    reinterpretations : list of str
        Header values taken to mean something else than they say.
    warnings : list of Warning
        Contradictions that do not stop the conversion.

    """

    reinterpretations: list[str] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)


def refuse_reinterpretations(caveats: Caveats) -> None:
    """Demand a header that needs no reinterpretation (`--strict`).

    Raises
    ------
    StudyError
        There is one; the message holds all.
    """
    if caveats.reinterpretations:
        raise StudyError(
            f"refused by --strict: {'; '.join(caveats.reinterpretations)}: "
            "correct the header, or run without --strict"
        )


# --- pet series ------------------------------------------------------------------------------


class Source(Enum):
    """What a series was read from: it decides which values there are, and their names."""

    SINGLE_FRAME = auto()
    ENHANCED = auto()
    BIDS = auto()


@dataclass(frozen=True)
class PetSlice:
    """Timing and scale of one slice, or of one frame of a multi-frame object.

    Attributes
    ----------
    acquisition : datetime, time or None
        AcquisitionDate and AcquisitionTime, the time alone where the date is missing; of an
        enhanced object FrameAcquisitionDateTime.
    frame_reference_time_s : float or None
        FrameReferenceTime [s].
    frame_duration_s : float or None
        ActualFrameDuration [s]; of an enhanced object FrameAcquisitionDuration.
    decay_reference : datetime or None
        The moment the values refer to, where the header states it: GE (0009,100D), Siemens
        (0071,1022); of an enhanced object DecayCorrectionDateTime if the values are corrected for
        decay, else the frame's FrameReferenceDateTime; of PET-BIDS ImageDecayCorrectionTime, else
        the frame's mean time.
    philips_suv_factor : float or None
        (7053,1000) [g/ml per count].
    philips_activity_factor : float or None
        (7053,1009) [Bq/ml per count].
    real_world_slope : float
        Value in the unit of the series per rescaled value: other than 1 in enhanced objects, and
        where PET-BIDS has kBq/ml or the like.

    """

    acquisition: datetime | time | None = None
    frame_reference_time_s: float | None = None
    frame_duration_s: float | None = None
    decay_reference: datetime | None = None
    philips_suv_factor: float | None = None
    philips_activity_factor: float | None = None
    real_world_slope: float = 1.0


@dataclass(frozen=True)
class PetSeries:
    """What decides the SUV of one PET series.

    Moments are aware of their UTC offset where the header gives one (in the value, or in
    TimezoneOffsetFromUTC), else naive.

    Attributes
    ----------
    slices : tuple of PetSlice
        In the order of the volume's slices.
    units : str or None
        Units of the rescaled values: "BQML", "GML", "CM2ML", "CNTS", ...; "UNKNOWN" where DICOM
        does not know them. So also the other codes.
    decay_correction : str or None
        "START", "ADMIN" or "NONE".
    corrected_image : frozenset of str
        Corrections applied to every slice: "ATTN", "DECY", ...
    suv_type : str or None
        SUVType of values that are SUV: "BW", "LBMJANMA", ...
    manufacturer : str
        "GE", "SIEMENS", "PHILIPS" or "OTHER".
    weight_kg, height_m : float or None
        PatientWeight and PatientSize.
    sex : str or None
        PatientSex.
    dose_bq, half_life_s : float or None
        RadionuclideTotalDose and RadionuclideHalfLife.
    nuclide_half_life_s : float or None
        Half-life of the nuclide that RadionuclideCodeSequence names.
    injection : datetime or None
        RadiopharmaceuticalStartDateTime.
    injection_clock : time or None
        RadiopharmaceuticalStartTime.
    series_start : datetime, time or None
        SeriesDate and SeriesTime; the time alone where the date is missing.
    source : Source
        In all but `SINGLE_FRAME`, `PetSlice.decay_reference` is standard.
    reinterpretations : tuple of str
        Header values taken to mean something else than they say, already on reading.
    first_file : int
        Index of the slice whose file comes first by name.

    """

    slices: tuple[PetSlice, ...]
    units: str | None
    decay_correction: str | None
    corrected_image: frozenset[str]
    suv_type: str | None = None
    manufacturer: str = "OTHER"
    weight_kg: float | None = None
    height_m: float | None = None
    sex: str | None = None
    dose_bq: float | None = None
    half_life_s: float | None = None
    nuclide_half_life_s: float | None = None
    injection: datetime | None = None
    injection_clock: time | None = None
    series_start: datetime | time | None = None
    source: Source = Source.SINGLE_FRAME
    reinterpretations: tuple[str, ...] = ()
    first_file: int = 0
