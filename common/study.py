"""One raw study as three checked images: CT [HU], PET [SUV] and mask, each on its own grid.

Brings the formats together: DICOM and NIfTI go in, `Image`s with their SUV provenance come out.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import dicom, dicom_masks
from common.dicom import DicomFile, Series, Stack, tag_of, text
from common.errors import StudyError
from common.image import Image
from common.nifti import read_nifti_file
from common.pet_header import read_pet_series
from common.raw_project import NiftiFile, Roles
from common.suv import SuvConversion, already_suv, suv_factors

ON_GRID_VOXELS = 0.1
"""Distance of a header's slice from a slice of the NIfTI PET that still counts as the same."""


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
    _check_identity(roles, conversion)
    ct, ct_stack = _read_ct(roles.ct)
    pet, pet_stack, suv = _read_pet(roles, conversion)
    mask, mask_warnings = _read_mask(
        roles, conversion, _grids_by_series(roles, ct, ct_stack, pet, pet_stack)
    )
    _check_overlap(ct, pet, "the PET and the CT")
    _check_mask(mask, pet, conversion)
    warnings = [*suv.provenance.get("warnings", []), *mask_warnings]
    return StudyImages(ct, pet, mask, suv.provenance, tuple(warnings))


def plan_study(roles: Roles, conversion: Conversion) -> str:
    """Return one line on what a study is made of and which SUV rule would apply."""
    _check_identity(roles, conversion)
    if isinstance(roles.pet, Series):
        suv = _conversion_of(dicom.stack_slices(roles.pet), conversion)
    else:
        suv = _conversion_for_nifti(roles.header, conversion)
    kinds = ", ".join(
        f"{name} {_kind(source)}"
        for name, source in (("CT", roles.ct), ("PET", roles.pet), ("mask", roles.mask))
    )
    units = suv.provenance.get("units") or "SUV"
    return f"{kinds}; {units}, SUV rule {suv.provenance['rule'] or '6'}"


def _kind(source: NiftiFile | Series | DicomFile) -> str:
    if isinstance(source, NiftiFile):
        return "NIfTI"
    if isinstance(source, Series):
        return f"DICOM x {source.n_images}"
    return text(source.header, "Modality")


# --- CT and PET ------------------------------------------------------------------------------


def _read_ct(source: NiftiFile | Series) -> tuple[Image, Stack | None]:
    if isinstance(source, Series):
        stack = dicom.stack_slices(source)
        return dicom.read_ct(stack), stack
    return compact_ct(read_nifti_file(source.path, "CT")), None


def compact_ct(ct: Image) -> Image:
    """Return a CT as int16 where every value is a whole number in its range, else as float32."""
    limits = np.iinfo(np.int16)
    if limits.min <= ct.data.min() and ct.data.max() <= limits.max:
        whole = ct.data.astype(np.int16)
        if np.array_equal(whole, ct.data):
            return Image(whole, ct.affine)
    return Image(ct.data.astype(np.float32, copy=False), ct.affine)


def _read_pet(roles: Roles, conversion: Conversion) -> tuple[Image, Stack | None, SuvConversion]:
    if isinstance(roles.pet, Series):
        stack = dicom.stack_slices(roles.pet)
        suv = _conversion_of(stack, conversion)
        return dicom.read_pet(stack, suv.factors), stack, suv
    image = read_nifti_file(roles.pet.path, "PET")
    suv = _conversion_for_nifti(roles.header, conversion)
    places = _slices_of_headers(roles.header, image, conversion) if roles.header else None
    factors = _factors_on(image, suv.factors, places).astype(np.float32)
    return Image(image.data.astype(np.float32, copy=False) * factors, image.affine), None, suv


def _conversion_of(stack: Stack, conversion: Conversion) -> SuvConversion:
    headers = stack.headers
    order = [item.frame for item in stack.slices] if len(headers) < len(stack.slices) else None
    if conversion.pet_units == "suv":
        return already_suv(len(stack.slices), conversion.suv_type)
    return _converted(headers, order, conversion)


def _conversion_for_nifti(header: Series | None, conversion: Conversion) -> SuvConversion:
    if header is None:
        return already_suv(1, conversion.suv_type)
    return _converted([file.header for file in header.files], None, conversion)


def _converted(
    headers: Sequence[Any], order: Sequence[int] | None, conversion: Conversion
) -> SuvConversion:
    series = read_pet_series(headers, conversion.tracer, order)
    if conversion.pet_units == "bqml":
        series = dataclasses.replace(series, units="BQML")
    return suv_factors(series, conversion.suv_type, conversion.strict)


def _slices_of_headers(
    header: Series, image: Image, conversion: Conversion
) -> NDArray[np.float64] | None:
    """Return the voxel index of each header's first pixel in a NIfTI PET, (n_headers, 3).

    None where the headers say nothing of their place, or the user vouches for it.

    Raises
    ------
    StudyError
        They lie elsewhere: the header belongs to another series.
    """
    if conversion.trust_geometry or "ImagePositionPatient" not in header.files[0].header:
        return None
    positions = [dicom.numbers(f.header, "ImagePositionPatient", 3) for f in header.files]
    ras = np.array(positions) * (-1, -1, 1)
    to_voxel = np.linalg.inv(image.affine)
    places: NDArray[np.float64] = ras @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    last = np.array(image.data.shape) - 1
    on_grid = np.abs(places - places.round()).max() <= ON_GRID_VOXELS
    inside = (places > -ON_GRID_VOXELS).all() and (places < last + ON_GRID_VOXELS).all()
    matrix = {int(dicom.number(header.files[0].header, k)) for k in ("Rows", "Columns")}
    if not (on_grid and inside and matrix <= set(image.data.shape)):
        raise StudyError(
            f"the header belongs to another series than the PET (its {tag_of('Rows')}, "
            f"{tag_of('Columns')} or {tag_of('ImagePositionPatient')} does not fit): give a header "
            "of this PET, or --trust-geometry if the PET was cropped or resampled"
        )
    return places


def _factors_on(
    image: Image, factors: NDArray[np.float64], places: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Return factors that broadcast over a NIfTI PET."""
    if np.ptp(factors) <= 1e-9 * factors.max():
        return factors[:1].reshape(1, 1, 1)
    if places is not None:
        axis = int(np.ptp(places, axis=0).argmax())
        indices = places[:, axis].round().astype(int)
        if sorted(indices) == list(range(image.data.shape[axis])):
            shape = [1, 1, 1]
            shape[axis] = len(indices)
            return factors[np.argsort(indices)].reshape(shape)
    raise StudyError(
        "the factor to SUV differs by slice, but the headers do not cover the slices of the PET: "
        "give the header of every slice, or the DICOM series itself"
    )


# --- the mask --------------------------------------------------------------------------------


def _grids_by_series(
    roles: Roles, ct: Image, ct_stack: Stack | None, pet: Image, pet_stack: Stack | None
) -> dict[str, Image]:
    """Return the images that contours may refer to, by SeriesInstanceUID and SOPInstanceUID."""
    grids: dict[str, Image] = {}
    for source, image in ((roles.ct, ct), (roles.pet, pet), (roles.header, pet)):
        if isinstance(source, Series):
            for file in source.files:
                grids[text(file.header, "SeriesInstanceUID")] = image
                grids[text(file.header, "SOPInstanceUID")] = image
    return grids


def _read_mask(
    roles: Roles, conversion: Conversion, grids: dict[str, Image]
) -> tuple[Image, tuple[str, ...]]:
    source = roles.mask
    roi = re.compile(conversion.roi, re.IGNORECASE) if conversion.roi else None
    if isinstance(source, NiftiFile):
        return _labels(read_nifti_file(source.path, "mask")), ()
    if text(source.header, "Modality") == "SEG":
        mask = dicom_masks.read_seg(source.path, roi)
    else:
        grid = _referenced_grid(source, grids)
        mask = dicom_masks.read_rtstruct(source.header, grid.data.shape, grid.affine, roi)
    return Image(mask.labels, mask.affine), mask.warnings


def _referenced_grid(rtstruct: DicomFile, grids: dict[str, Image]) -> Image:
    for uid in (
        *dicom_masks.referenced_series(rtstruct.header),
        *dicom_masks.referenced_images(rtstruct.header),
    ):
        if uid in grids:
            return grids[uid]
    raise StudyError(
        "the RTSTRUCT was drawn on a series that is not in the study "
        f"({tag_of('RTReferencedSeriesSequence')}): add that series, or convert the mask to NIfTI"
    )


def _labels(mask: Image) -> Image:
    """Return a NIfTI mask as uint8 or uint16 labels."""
    labels = mask.data
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise StudyError("the mask has values that are not whole numbers: give labels, not weights")
    if labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
        raise StudyError(
            f"the mask has labels from {labels.min():g} to {labels.max():g}: give labels from 0 to "
            f"{np.iinfo(np.uint16).max}"
        )
    dtype = np.uint8 if labels.max() <= np.iinfo(np.uint8).max else np.uint16
    return Image(labels.astype(dtype), mask.affine)


# --- checks ----------------------------------------------------------------------------------


def _check_identity(roles: Roles, conversion: Conversion) -> None:
    """Refuse DICOM files of several patients, or in several frames of reference."""
    headers = {
        name: source.files[0].header if isinstance(source, Series) else source.header
        for name, source in (
            ("CT", roles.ct),
            ("PET", roles.pet),
            ("mask", roles.mask),
            ("PET header", roles.header),
        )
        if isinstance(source, Series | DicomFile)
    }
    keywords = ["PatientID", "PatientBirthDate"]
    if not conversion.trust_geometry:
        keywords.append("FrameOfReferenceUID")
    for keyword in keywords:
        values = {name: text(header, keyword) for name, header in headers.items()}
        values = {name: value for name, value in values.items() if value}
        if len(set(values.values())) > 1:
            raise StudyError(
                f"{' and '.join(values)} do not belong together ({tag_of(keyword)} differs): "
                + (
                    "register them, or give --trust-geometry if they lie in one space"
                    if keyword == "FrameOfReferenceUID"
                    else "put each patient's files into a study of its own"
                )
            )


def _check_overlap(one: Image, other: Image, names: str) -> None:
    """Refuse images whose boxes do not overlap in space."""
    shape = np.array(other.data.shape)
    corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in shape), indexing="ij")).reshape(3, -1)
    to_one = np.linalg.inv(one.affine) @ other.affine
    there = to_one[:3, :3] @ corners + to_one[:3, 3:]
    if (there.max(axis=1) <= -0.5).any() or (
        there.min(axis=1) >= np.array(one.data.shape) - 0.5
    ).any():
        raise StudyError(
            f"{names} do not overlap in space: check that they belong to one examination"
        )


def _check_mask(mask: Image, pet: Image, conversion: Conversion) -> None:
    occupied = [np.flatnonzero(mask.data.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not occupied[0].size:
        if conversion.allow_empty_mask:
            return
        raise StudyError(
            "the mask is empty: give a mask with labelled voxels, or --allow-empty-mask if the "
            "study is negative"
        )
    box = tuple(slice(int(line[0]), int(line[-1]) + 1) for line in occupied)
    corner = np.array([axis.start for axis in box])
    affine = mask.affine.copy()
    affine[:3, 3] += mask.affine[:3, :3] @ corner
    _check_overlap(pet, Image(mask.data[box], affine), "the mask's labelled voxels and the PET")
