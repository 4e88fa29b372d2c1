"""One raw study as three checked images: CT [HU], PET [SUV] and mask, each on its own grid.

Brings the formats together: DICOM and NIfTI go in, `Image`s with their SUV provenance come out.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.belonging import check_identity, check_mask, check_overlap, role_drawn_on
from common.candidates import NiftiFile
from common.dicom import DicomFile, Series
from common.dicom_pixels import read_ct, read_pet
from common.dicom_rtstruct import read_rtstruct
from common.dicom_seg import read_seg
from common.dicom_stack import Stack, refuse_moving, stack_slices
from common.dicom_values import items
from common.errors import StudyError
from common.header_planes import check_planes_of, factors_on, planes_of_headers
from common.image import Image, embedded
from common.nifti import read_nifti_file
from common.pet_header import read_pet_series
from common.pet_series import PetSeries
from common.roles import Roles
from common.suv import SuvConversion, already_suv, suv_factors

FloatArray = NDArray[np.float64]

PLAUSIBLE_LARGEST_SUV = (0.1, 1000.0)
"""What the largest SUV of a PET lies between, unless its values have another unit than believed."""

WHOLE_LABEL = 1e-3
"""Distance from a whole number that a label may have, for the rounding of a NIfTI's scaling."""


@dataclass(frozen=True)
class Conversion:
    """The options that decide the images of a study, named as on the command line."""

    pet_units: str = "auto"
    suv_type: str = "bw"
    strict: bool = False
    tracer: int | None = None
    roi: str | None = None
    allow_empty_mask: bool = False
    trust_geometry: bool = False

    @property
    def needs_header(self) -> bool:
        """Whether a NIfTI PET needs a DICOM header."""
        return self.pet_units != "suv"


@dataclass(frozen=True, eq=False)
class StudyImages:
    """The images of one study, what is known of their SUV, and warnings."""

    ct: Image
    pet: Image
    mask: Image
    suv: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def by_role(self) -> dict[str, Image]:
        """Images by their role in the project zip."""
        return {"ct": self.ct, "petsuv": self.pet, "mask": self.mask}

    @property
    def record(self) -> dict[str, Any]:
        """What ``studies.json`` says of the study; no identity."""
        return {
            "suv": self.suv,
            "shapes": {role: list(image.data.shape) for role, image in self.by_role.items()},
            "spacings": {
                role: [round(mm, 6) for mm in image.grid.spacing_mm]
                for role, image in self.by_role.items()
            },
            "warnings": list(self.warnings),
        }


def read_study(roles: Roles, conversion: Conversion) -> StudyImages:
    """Read the files of a study, convert PET to SUV and check that all fits together.

    Raises
    ------
    StudyError
        Any file that cannot be read, any refusal of the SUV rules, images that do not belong
        together.
    """
    plan = plan_study(roles, conversion)
    ct = _read_ct(plan.ct)
    pet, pet_warnings = _read_pet(plan, conversion)
    check_overlap(ct, pet)
    mask, mask_warnings = _read_mask(plan, conversion, {"ct": ct, "pet": pet})
    warnings = (*plan.warnings, *pet_warnings, *mask_warnings, *_implausible(pet))
    warnings += check_mask(mask, pet, allow_empty=conversion.allow_empty_mask)
    return StudyImages(ct, pet, mask, plan.suv.provenance, warnings)


# --- what headers say ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """How a study will be converted, by its headers.

    Attributes
    ----------
    ct, pet : NiftiFile or Stack
    mask : NiftiFile or DicomFile
    drawn_on : "ct", "pet" or None
        The image that an RTSTRUCT was drawn on.
    header : Series, Stack or None
        Of a NIfTI PET; a Stack where it is one multi-frame object.
    suv : SuvConversion
        A factor for each slice of a DICOM PET; for each header of a NIfTI PET.
    warnings : tuple of str
    """

    ct: NiftiFile | Stack
    pet: NiftiFile | Stack
    mask: NiftiFile | DicomFile
    drawn_on: str | None
    header: Series | Stack | None
    suv: SuvConversion
    warnings: tuple[str, ...]

    @property
    def suv_rule(self) -> str:
        """What the PET's values are, and the rule that makes them SUV."""
        units, rule = self.suv.provenance["units"], self.suv.provenance["rule"]
        return f"{units}, rule {rule}" if units else rule


def plan_study(roles: Roles, conversion: Conversion) -> Plan:
    """Find by the headers alone how a study will be converted.

    Raises
    ------
    StudyError
        As `read_study`, but for what only voxels tell.
    """
    warnings = [*roles.warnings, *check_identity(roles, trusted=conversion.trust_geometry)]
    ct, pet = (
        stack_slices(image) if isinstance(image, Series) else image
        for image in (roles.ct, roles.pet)
    )
    header: Series | Stack | None = None if isinstance(pet, Stack) else roles.header
    if isinstance(header, Series):
        refuse_moving(header)
        if items(header.files[0].header, "PerFrameFunctionalGroupsSequence"):
            header = stack_slices(header)
    source = pet if isinstance(pet, Stack) else header
    suv = _suv(source, conversion, in_unit=isinstance(pet, NiftiFile))
    for stack in (ct, pet):
        warnings += stack.warnings if isinstance(stack, Stack) else ()
    warnings += [*suv.provenance["reinterpretations"], *suv.provenance["warnings"]]
    return Plan(ct, pet, roles.mask, role_drawn_on(roles), header, suv, tuple(warnings))


def _suv(source: Series | Stack | None, conversion: Conversion, *, in_unit: bool) -> SuvConversion:
    """Return the factors to SUV of each slice, or of each header of values in its unit already."""
    if conversion.pet_units == "suv":
        n_slices = len(source.slices) if isinstance(source, Stack) else 1
        series_if_readable = _series_if_readable(source, conversion)
        return already_suv(n_slices, conversion.suv_type, series_if_readable, conversion.strict)
    series = _pet_series(source, conversion)
    if conversion.pet_units == "bqml":
        series = dataclasses.replace(series, units="BQML")
    if in_unit:
        slices = (dataclasses.replace(each, real_world_slope=1.0) for each in series.slices)
        series = dataclasses.replace(series, slices=tuple(slices))
    return suv_factors(series, conversion.suv_type, conversion.strict)


def _series_if_readable(source: Series | Stack | None, conversion: Conversion) -> PetSeries | None:
    # The user vouches for the values, so headers tell no more than the patient's weight.
    try:
        return _pet_series(source, conversion)
    except StudyError:
        return None


def _pet_series(source: Series | Stack | None, conversion: Conversion) -> PetSeries:
    if isinstance(source, Stack):
        return read_pet_series(source.headers, conversion.tracer, source.header_and_frame)
    headers = [file.header for file in source.files] if source else []
    return read_pet_series(headers, conversion.tracer)


# --- CT and PET ------------------------------------------------------------------------------


def _read_ct(source: NiftiFile | Stack) -> Image:
    if isinstance(source, Stack):
        return read_ct(source)
    return compact_ct(read_nifti_file(source.path, "CT"))


def compact_ct(ct: Image) -> Image:
    """Return a CT as int16 where every value is a whole number in its range, else as float32."""
    limits = np.iinfo(np.int16)
    if limits.min <= ct.data.min() and ct.data.max() <= limits.max:
        whole = ct.data.astype(np.int16)
        if np.array_equal(whole, ct.data):
            return Image(whole, ct.affine)
    return Image(ct.data.astype(np.float32, copy=False), ct.affine)


def _read_pet(plan: Plan, conversion: Conversion) -> tuple[Image, tuple[str, ...]]:
    if isinstance(plan.pet, Stack):
        return read_pet(plan.pet, plan.suv.factors), ()
    image = read_nifti_file(plan.pet.path, "PET")
    planes = planes_of_headers(plan.header) if plan.header else None
    warnings: tuple[str, ...] = ()
    if planes is not None:
        warnings = check_planes_of(image, planes, trusted=conversion.trust_geometry)
    factors = factors_on(image, plan.suv, planes).astype(np.float32)
    return Image(image.data.astype(np.float32, copy=False) * factors, image.affine), warnings


def _implausible(pet: Image) -> tuple[str, ...]:
    """Warn where PET values can hardly be SUV."""
    least, most = PLAUSIBLE_LARGEST_SUV
    largest = float(pet.data.max())
    if least <= largest <= most:
        return ()
    return (
        f"the largest SUV of the PET is {largest:.3g}: check the unit of its values (--pet-units)",
    )


# --- the mask --------------------------------------------------------------------------------


def _read_mask(
    plan: Plan, conversion: Conversion, images: Mapping[str, Image]
) -> tuple[Image, tuple[str, ...]]:
    source = plan.mask
    roi = re.compile(conversion.roi, re.IGNORECASE) if conversion.roi else None
    if isinstance(source, NiftiFile):
        unmet = ("a NIfTI mask names no regions: all its labels are kept, whatever --roi",)
        return _labels(read_nifti_file(source.path, "mask")), unmet if roi else ()
    if plan.drawn_on is not None:
        grid = images[plan.drawn_on]
        mask = read_rtstruct(source.header, grid.data.shape, grid.affine, roi)
        return Image(mask.labels, mask.affine), mask.warnings
    mask = read_seg(source.path, roi)
    drawn = Image(mask.labels, mask.affine)
    # A SEG may leave out empty planes of the image that it was drawn on.
    whole = embedded(drawn, images["pet"])
    return whole if whole is not drawn else embedded(drawn, images["ct"]), mask.warnings


def _labels(mask: Image) -> Image:
    """Return a NIfTI mask as uint8 or uint16 labels."""
    labels = mask.data
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        if np.abs(labels - whole).max() > WHOLE_LABEL:
            raise StudyError(
                "the mask has values that are not whole numbers: give labels, not weights"
            )
        labels = whole
    if labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
        raise StudyError(
            f"the mask has labels from {labels.min():g} to {labels.max():g}: give labels from 0 to "
            f"{np.iinfo(np.uint16).max}"
        )
    dtype = np.uint8 if labels.max() <= np.iinfo(np.uint8).max else np.uint16
    return Image(labels.astype(dtype), mask.affine)
