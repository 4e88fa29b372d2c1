"""One raw study as three checked images: CT [HU], PET [SUV] and mask, each on its own grid.

Brings the formats together: DICOM and NIfTI go in, `Image`s with their SUV provenance come out.
On the way it is checked that files and images belong together: one patient, one space, one place.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.components import voxels_above_zero
from common.dicom.attributes import items, joined_text, tag_of
from common.dicom.files import DicomFile, Series
from common.dicom.masks import listed, referenced_series
from common.dicom.pet import read_pet_series
from common.dicom.pixels import Block, block_for, read_ct, read_pet
from common.dicom.rtstruct import read_rtstruct
from common.dicom.seg import read_seg
from common.dicom.series import Stack, refuse_moving, stack_slices
from common.dicom.uneven import lies_on_slices, read_mask_of_uneven
from common.errors import Kind, StudyError, Warning, texts_and_kinds
from common.geometry import Grid, Image
from common.image_checks import check_labels, check_mask, check_mask_overlaps, check_overlap
from common.lesions import dose_fraction
from common.masks import completed, embedded, united
from common.nifti import read_nifti_file, read_nifti_header
from common.plausibility import implausible_mask, implausible_pet, summary_of, weight_of
from common.raw.candidates import Candidate, NiftiFile, NiftiFiles
from common.raw.consistency import DrawnOn, check_frames, check_identity, find_drawn_on
from common.raw.header_planes import check_planes_of, factors_on, planes_of_headers
from common.raw.mapping import Taken
from common.raw.roles import Roles
from common.raw.sidecar import read_sidecar
from common.raw.words import ROLE_NAMES
from common.suv.factors import SuvConversion, already_suv, suv_factors
from common.suv.inputs import PetSeries
from common.suv.provenance import minimal


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
    mask_on: str | None = None
    uneven_slices: str = "refuse"
    minimal_provenance: bool = False

    @property
    def roi_pattern(self) -> re.Pattern[str] | None:
        """What names of regions are held against."""
        return re.compile(self.roi, re.IGNORECASE) if self.roi else None

    @property
    def needs_header(self) -> bool:
        """Whether a NIfTI PET needs a DICOM header."""
        return self.pet_units != "suv"


# --- what headers say ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """How a study will be converted, by its headers.

    Attributes
    ----------
    roles : Roles
    conversion : Conversion
    ct, pet : NiftiFile or Stack
    ct_grid, pet_grid : Grid
    drawn_on : DrawnOn or None
        The image that an RTSTRUCT was drawn on.
    uneven : Stack or None
        The image on whose unevenly spaced slices a DICOM mask was drawn.
    suv : SuvConversion
        A factor for each slice of a DICOM PET; for each header of a NIfTI PET.
    factors : array
        For each slice of a DICOM PET; broadcast over the voxels of a NIfTI PET.
    warnings : tuple of Warning
    """

    roles: Roles
    conversion: Conversion
    ct: NiftiFile | Stack
    pet: NiftiFile | Stack
    ct_grid: Grid
    pet_grid: Grid
    drawn_on: DrawnOn | None
    uneven: Stack | None
    suv: SuvConversion
    factors: NDArray[np.float64]
    warnings: tuple[Warning, ...]

    @property
    def suv_rule(self) -> str:
        """What the PET's values are, and the rule that makes them SUV."""
        units, rule = self.suv.provenance.units, self.suv.provenance.rule
        return f"{units}, rule {rule}" if units else rule


def plan_study(roles: Roles, conversion: Conversion) -> Plan:
    """Find by the headers alone how a study will be converted.

    Raises
    ------
    StudyError
        A header that cannot be read, any refusal of the SUV rules, files that do not belong
        together.
    """
    warnings = [
        *roles.warnings,
        *check_identity(roles, trusted=conversion.trust_geometry),
    ]
    ct, pet = (
        stack_slices(image, resample_uneven=conversion.uneven_slices == "resample")
        if isinstance(image, Series)
        else image
        for image in (roles.ct, roles.pet)
    )
    header: Series | Stack | None = None if isinstance(pet, Stack) else roles.header
    if isinstance(header, Series):
        refuse_moving(header)
        if items(header.files[0].header, "PerFrameFunctionalGroupsSequence"):
            header = stack_slices(header)
    source = pet if isinstance(pet, Stack) else header
    if roles.sidecar and conversion.pet_units == "auto":
        suv = suv_factors(read_sidecar(roles.sidecar), conversion.suv_type, conversion.strict)
    else:
        suv = _suv(source, conversion, in_unit=isinstance(pet, NiftiFile))
    for stack in (ct, pet):
        warnings += stack.warnings if isinstance(stack, Stack) else ()
    warnings += suv.provenance.told
    drawn_on = find_drawn_on(roles, conversion.mask_on)
    if drawn_on is not None:
        trusted = conversion.trust_geometry
        warnings += check_frames(roles, drawn_on, conversion.roi_pattern, trusted=trusted)
        if conversion.mask_on not in (None, drawn_on.role):
            text = (
                f"the RTSTRUCT names the {ROLE_NAMES[drawn_on.role]} as what it was drawn on: "
                f"read so, whatever --mask-on {conversion.mask_on}"
            )
            warnings.append(Warning(Kind.MASK, text))
        if drawn_on.by_option:
            text = (
                f"the RTSTRUCT does not tell that it was drawn on the {ROLE_NAMES[drawn_on.role]} "
                f"({tag_of('RTReferencedSeriesSequence')}): trusted (--mask-on)"
            )
            warnings.append(Warning(Kind.TRUSTED, text))
    uneven = _uneven_slices(roles.mask, {"ct": ct, "pet": pet}, drawn_on)
    if uneven is not None:
        text = (
            f"the mask was drawn on the unevenly spaced slices of the {ROLE_NAMES[uneven[0]]}: "
            "each slice of the even grid takes the nearest"
        )
        warnings.append(Warning(Kind.MASK, text))
    ct_grid, pet_grid = _grid_of(ct, "CT"), _grid_of(pet, "PET")
    check_overlap(ct_grid, pet_grid)
    mask_grids = [_grid_of(file, "mask") for file in _nifti_masks(roles.mask)]
    if not conversion.allow_empty_mask:
        check_mask_overlaps(mask_grids, pet_grid)
    factors = suv.factors
    if isinstance(pet, NiftiFile):
        planes = planes_of_headers(header) if header else None
        if planes is not None:
            warnings += check_planes_of(pet_grid, planes, trusted=conversion.trust_geometry)
        factors = factors_on(pet_grid, suv, planes)
    return Plan(
        roles=roles,
        conversion=conversion,
        ct=ct,
        pet=pet,
        ct_grid=ct_grid,
        pet_grid=pet_grid,
        drawn_on=drawn_on,
        uneven=uneven[1] if uneven is not None else None,
        suv=suv,
        factors=factors,
        warnings=tuple(warnings),
    )


def _grid_of(source: NiftiFile | Stack, role: str) -> Grid:
    """Return where the voxels of an image lie, by its headers."""
    if isinstance(source, Stack):
        return Grid(source.shape, source.affine)
    header = read_nifti_header(source.path, role)
    return Grid(header.shape, header.affine)


def _nifti_masks(mask: Candidate) -> tuple[NiftiFile, ...]:
    if isinstance(mask, NiftiFiles):
        return mask.files
    return (mask,) if isinstance(mask, NiftiFile) else ()


def _uneven_slices(
    mask: Candidate, images: Mapping[str, NiftiFile | Stack], drawn_on: DrawnOn | None
) -> tuple[str, Stack] | None:
    """Return the image, and its role, on whose unevenly spaced slices a DICOM mask was drawn."""
    if not isinstance(mask, DicomFile):
        return None
    for role, image in images.items():
        if not isinstance(image, Stack) or image.places is None:
            continue
        is_named = drawn_on.role == role if drawn_on is not None else _names_series(mask, image)
        if is_named and lies_on_slices(mask, image):
            return role, image
    return None


def _suv(source: Series | Stack | None, conversion: Conversion, *, in_unit: bool) -> SuvConversion:
    """Return the factors to SUV of each slice, or of each header of values in its unit already."""
    if conversion.pet_units == "suv":
        slices = source.slices if isinstance(source, Stack) else ()
        scales = [1.0 if in_unit else each.rescale.real_world_slope for each in slices] or [1.0]
        series_if_readable = _series_if_readable(source, conversion)
        return already_suv(scales, conversion.suv_type, series_if_readable, conversion.strict)
    series = _pet_series(source, conversion)
    if conversion.pet_units == "bqml":
        series = dataclasses.replace(series, units="BQML")
    if in_unit:
        in_units = (dataclasses.replace(each, real_world_slope=1.0) for each in series.slices)
        series = dataclasses.replace(series, slices=tuple(in_units))
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


# --- what voxels say --------------------------------------------------------------------------

Keep = Callable[[str, Image], None]
"""Takes an image, by its role in the project zip; the next may be read into its memory."""


@dataclass(frozen=True, eq=False)
class ReadStudy:
    """What is told of a study: grids of its images by role, its SUV, warnings, and sources."""

    grids: Mapping[str, Grid]
    suv: dict[str, Any]
    warnings: tuple[Warning, ...]
    taken: Taken

    @property
    def record(self) -> dict[str, Any]:
        """What ``studies.json`` says of the study; no identity."""
        return {
            "suv": self.suv,
            "shapes": {role: list(grid.shape) for role, grid in self.grids.items()},
            "spacings": {
                role: [round(mm, 6) for mm in grid.spacing_mm] for role, grid in self.grids.items()
            },
            **texts_and_kinds(self.warnings),
        }


def read_study(plan: Plan, keep: Keep) -> ReadStudy:
    """Read the files of a study, convert PET to SUV and check that all fits together.

    Each image goes to `keep` as soon as it can, so that one block of memory serves CT and PET.

    Raises
    ------
    StudyError
        Any file that cannot be read, images that do not belong together.
    """
    provenance = plan.suv.provenance.record
    told = minimal(provenance) if plan.conversion.minimal_provenance else provenance
    mask, mask_warnings, regions = _read_mask(plan)
    grids = {"ct": plan.ct_grid, "petsuv": plan.pet_grid, "mask": mask.grid}
    allow_empty = plan.conversion.allow_empty_mask
    beside = check_mask(mask, plan.pet_grid, allow_empty=allow_empty, warnings=mask_warnings)
    block = block_for(*(each for each in (plan.ct, plan.pet) if isinstance(each, Stack)))
    ct = _read_ct(plan, block)
    summary = summary_of(ct)
    keep("ct", ct)
    del ct
    implausible = implausible_mask(mask, summary, plan.pet_grid)
    keep("mask", mask)
    del mask
    pet = _read_pet(plan, block)
    weight_kg = weight_of(told)
    fraction = None if weight_kg is None else dose_fraction(pet.data, pet.affine, weight_kg)
    implausible = [*implausible_pet(summary, pet, fraction, weight_kg), *implausible]
    keep("petsuv", pet)
    warnings = (*plan.warnings, *mask_warnings, *beside, *implausible)
    return ReadStudy(grids, told, warnings, taken_from(plan.roles, regions))


def taken_from(roles: Roles, regions: Sequence[str]) -> Taken:
    """Name what a study was read from."""
    return Taken(_named(roles.ct), _named(roles.pet), _named(roles.mask), "; ".join(regions))


def _named(source: Candidate) -> str:
    if isinstance(source, Series):
        description = joined_text(source.files[0].header, "SeriesDescription")
        return f"{description or 'no description'} ({source.n_images} slices)"
    if isinstance(source, NiftiFiles):
        return "; ".join(file.name for file in source.files)
    return source.name


# --- CT and PET ------------------------------------------------------------------------------


def _read_ct(plan: Plan, block: Block) -> Image:
    if isinstance(plan.ct, Stack):
        return read_ct(plan.ct, block)
    return _compact_ct(read_nifti_file(plan.ct.path, "CT"))


def _compact_ct(ct: Image) -> Image:
    """Return a CT as int16 where every value is a whole number in its range, else as float32."""
    if ct.data.dtype == np.int16:
        return ct
    limits, (least, greatest) = np.iinfo(np.int16), ct.extremes
    if limits.min <= least and greatest <= limits.max:
        whole = ct.data.astype(np.int16)
        if np.array_equal(whole, ct.data):
            return Image(whole, ct.affine)
    return Image(ct.data.astype(np.float32, copy=False), ct.affine)


def _read_pet(plan: Plan, block: Block) -> Image:
    if isinstance(plan.pet, Stack):
        return read_pet(plan.pet, plan.factors, block)
    image = read_nifti_file(plan.pet.path, "PET")
    suv = image.data.astype(np.float32, copy=False)
    suv *= plan.factors.astype(np.float32)
    return Image(suv, image.affine)


# --- the mask --------------------------------------------------------------------------------


class _ReadMask(NamedTuple):
    """A mask, what was put right, and the names of the regions that were taken (private)."""

    image: Image
    warnings: tuple[Warning, ...]
    regions: tuple[str, ...] = ()


def _read_mask(plan: Plan) -> _ReadMask:
    source = plan.roles.mask
    roi = plan.conversion.roi_pattern
    grids = [plan.pet_grid, plan.ct_grid]
    if isinstance(source, NiftiFile | NiftiFiles):
        text = "a NIfTI mask names no regions: all its labels are kept, whatever --roi"
        unmet = (Warning(Kind.MASK, text),)
        nifti, warnings = _read_nifti_mask(source)
        return _ReadMask(completed(nifti, *grids), (*warnings, *(unmet if roi else ())))
    if plan.uneven is not None:
        mask = read_mask_of_uneven(source, plan.uneven, roi)
        return _ReadMask(Image(mask.labels, mask.affine), mask.warnings, mask.regions)
    if plan.drawn_on is not None:
        grid = plan.ct_grid if plan.drawn_on.role == "ct" else plan.pet_grid
        mask = read_rtstruct(source.header, grid.shape, grid.affine, roi)
        return _ReadMask(Image(mask.labels, mask.affine), mask.warnings, mask.regions)
    names_ct, names_pet = (_names_series(source, image) for image in (plan.ct, plan.pet))
    if names_ct:
        grids.reverse()
    names_no_other = names_ct or names_pet or not referenced_series(source.header)
    mask = read_seg(source.path, roi, grids, is_of_images=names_no_other)
    # A SEG may leave out empty planes of the image that it was drawn on.
    whole = embedded(Image(mask.labels, mask.affine), plan.pet_grid, plan.ct_grid)
    return _ReadMask(completed(whole, *grids), mask.warnings, mask.regions)


def _names_series(mask: DicomFile, image: NiftiFile | Stack) -> bool:
    """Tell whether a SEG refers to a series."""
    if not isinstance(image, Stack):
        return False
    uids = {joined_text(header, "SeriesInstanceUID") for header in image.headers}
    return not uids.isdisjoint(referenced_series(mask.header))


def _read_nifti_mask(source: NiftiFile | NiftiFiles) -> tuple[Image, tuple[Warning, ...]]:
    if isinstance(source, NiftiFile):
        mask = check_labels(read_nifti_file(source.path, "mask"))
        return mask, tuple(_several_labels(mask))
    return united([check_labels(read_nifti_file(file.path, "mask")) for file in source.files])


def _several_labels(mask: Image) -> Iterator[Warning]:
    """Say that a file holds several labels: what they mean, it does not tell."""
    found = np.bincount(mask.data[tuple(voxels_above_zero(mask.data))])
    labels = np.flatnonzero(found).tolist()
    if len(labels) > 1:
        yield Warning(
            Kind.REGIONS,
            f"labels {listed(labels)} ({len(labels)} labels) all count as tumour, unless "
            "preprocessing.py --labels keep keeps them apart: check that none is an organ",
        )
