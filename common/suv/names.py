"""What messages call the values that decide an SUV, by what the PET was read from.

Pure: attributes of DICOM with their tags, or fields of PET-BIDS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.suv.inputs import Source

DECAY_CORRECTION = "DecayCorrection (0054,1102)"
DECAY_CORRECTED = "DecayCorrected (0018,9758)"
SERIES_CLOCK = "SeriesTime (0008,0031)"
ACQUISITION_CLOCK = "AcquisitionTime (0008,0032)"
START_DATETIME = "RadiopharmaceuticalStartDateTime (0018,1078)"
START_TIME = "RadiopharmaceuticalStartTime (0018,1072)"
HALF_LIFE = "RadionuclideHalfLife (0018,1075)"


@dataclass(frozen=True)
class Names:
    """Where the values of a PET are stated, each with its place as a remedy needs it.

    Attributes
    ----------
    place, weight_place, dose_place : str
        What is to be corrected: at all, of the weight, of the dose.
    units, suv_type, weight, dose, half_life, injection, decay_reference : str
        The attribute or field.
    decay_correction, decay_corrections : str
        The attribute or field, and the values that it may have.
    times : str
        All that times of injection and scan are told by.
    """

    place: str
    units: str
    suv_type: str
    decay_correction: str
    decay_corrections: str
    weight: str
    weight_place: str
    dose: str
    dose_place: str
    half_life: str
    injection: str
    decay_reference: str
    times: str


_SINGLE_FRAME = Names(
    place="the header",
    units="Units (0054,1001)",
    suv_type="SUVType (0054,1006)",
    decay_correction=DECAY_CORRECTION,
    decay_corrections="START, ADMIN or NONE",
    weight="PatientWeight (0010,1030)",
    weight_place="the header [kg]",
    dose="RadionuclideTotalDose (0018,1074)",
    dose_place="the header [Bq]",
    half_life=HALF_LIFE,
    injection=START_DATETIME,
    decay_reference=SERIES_CLOCK,
    times=f"{START_DATETIME}, {START_TIME}, {SERIES_CLOCK}, {ACQUISITION_CLOCK}",
)
_UNITS_OF_FRAMES = "MeasurementUnitsCodeSequence (0040,08EA)"

NAMES: Mapping[Source, Names] = {
    Source.SINGLE_FRAME: _SINGLE_FRAME,
    Source.ENHANCED: replace(
        _SINGLE_FRAME,
        units=_UNITS_OF_FRAMES,
        suv_type=_UNITS_OF_FRAMES,
        decay_correction=DECAY_CORRECTED,
        decay_corrections="YES or NO",
        decay_reference="DecayCorrectionDateTime (0018,9701)",
    ),
    Source.BIDS: Names(
        place="the JSON sidecar of the PET",
        units="Units",
        suv_type="Units",
        decay_correction="ImageDecayCorrected",
        decay_corrections="true or false",
        weight="PatientWeight",
        weight_place="the JSON sidecar of the PET, or as weight in participants.tsv [kg]",
        dose="InjectedRadioactivity in Bq",
        dose_place="the JSON sidecar of the PET, with InjectedRadioactivityUnits",
        half_life="TracerRadionuclide",
        injection="InjectionStart",
        decay_reference="ImageDecayCorrectionTime",
        times="InjectionStart, FrameTimesStart, ImageDecayCorrectionTime",
    ),
}
