"""Write a demo raw project: invented patients whose every lesion is known in closed form.

OUT/<patient>/<study>/ holds whole-body FDG-PET/CT studies as hospitals export them: DICOM series
with an RTSTRUCT, a DICOM SEG or a NIfTI mask, one study in NIfTI with a PET DICOM header, patients
with a follow-up, and one study without a mask, which the chain has to skip.

Bodies of several sizes, with organs and lesions, are ellipsoids and cylinders in patient
coordinates. A voxel takes the value found at its centre; the PET is then blurred as a scanner
blurs it, and has its noise, unless told otherwise. The same options give the same bytes. The
truth stands in DEMO_STUDIES and in what invented_studies makes up; tests read it from there.
"""

import argparse
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, count, islice
from pathlib import Path

import highdicom
import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DSfloat

EPILOG = """examples:
  python examples/phantom.py demo_raw
  python examples/phantom.py more_raw --studies 20
  python examples/phantom.py big_raw --matrix-ct 512 --matrix-pet 400 --slices 326 --noise all
"""

F18_HALF_LIFE_S = 6586.2
DECAY_PER_S = math.log(2) / F18_HALF_LIFE_S
TOP_MM = 20.0  # z of the uppermost slice centre; 0 is the crown of the head
SCAN_MM = 1000.0  # slices x spacing: from above the head to the thighs
FEWEST_SLICES = 100  # what the lesions below take
CT_FIELD_MM, CT_CENTER_MM = 500.0, (-4.0, -12.0)
PET_FIELD_MM, PET_CENTER_MM = 448.0, (2.5, -9.0)
RESOLUTION_MM = 6.0  # full width at half maximum of the PET's blur
BED_SLICES, BED_STEP_S, FRAME_DURATION_S = 25, 135.0, 120.0
CONTOUR_POINTS = 360
NOISE_HU, NOISE_SUV, SEED = 15.0, 0.1, 20240301  # NOISE_SUV is a part of the SUV


@dataclass(frozen=True)
class Tissue:
    """Healthy tissue: centre and semi-axes [mm, RAS], CT [HU], SUVbw [g/ml].

    An ellipsoid, or an elliptic cylinder along z whose third semi-axis is half its height.
    """

    center_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    hu: float
    suv: float
    cylinder: bool = False

    @property
    def volume_ml(self) -> float:
        ball = 2.0 if self.cylinder else 4 / 3
        return ball * math.pi * math.prod(self.semi_axes_mm) / 1000


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid of tumour: centre and semi-axes [mm, RAS], SUVbw [g/ml], mask label, CT [HU]."""

    center_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    suv: float
    label: int = 1
    hu: float = 60.0
    cylinder = False  # of no instance

    @property
    def volume_ml(self) -> float:
        return 4 / 3 * math.pi * math.prod(self.semi_axes_mm) / 1000


@dataclass(frozen=True)
class Study:
    """One PET/CT study: who, how it was acquired, how it was exported, and the truth in it."""

    patient: str
    study: str
    patient_name: str
    sex: str
    weight_kg: float
    height_m: float
    dose_bq: float
    injected: datetime
    scanned: datetime
    lesions: tuple[Lesion, ...]
    heart_suv: float = 2.8
    bladder_suv: float = 22.0
    arms: str | None = "up"  # or down, or None: outside the scan
    units: str = "BQML"  # or GML
    decay_correction: str = "START"  # or ADMIN
    images: str = "DICOM"  # or NIfTI
    mask: str | None = "RTSTRUCT"  # or SEG, NIfTI, None
    mask_drawn_on: str = "PET"  # or CT, for an RTSTRUCT

    @property
    def frame(self) -> float:
        """Size of skeleton and organs relative to a person of 1.75 m."""
        return self.height_m / 1.75

    @property
    def girth(self) -> float:
        """Width and depth of the body relative to a person of 1.75 m and 75 kg."""
        return math.sqrt(self.weight_kg / 75 / self.frame)


@dataclass(frozen=True)
class Grid:
    """Axial slices as DICOM stores them: arrays run to Left, Posterior and Superior."""

    matrix: int
    slices: int
    pixel_mm: float
    slice_mm: float
    center_mm: tuple[float, float]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel to RAS+ [mm], (4, 4)."""
        affine = np.diag([-self.pixel_mm, -self.pixel_mm, self.slice_mm, 1.0])
        affine[:2, 3] = np.add(self.center_mm, (self.matrix - 1) / 2 * self.pixel_mm)
        affine[2, 3] = TOP_MM - (self.slices - 1) * self.slice_mm
        return affine

    @property
    def voxel_centers_mm(self) -> list[NDArray[np.float64]]:
        """The x, y and z of columns, rows and slices [mm, RAS]."""
        counts = (self.matrix, self.matrix, self.slices)
        return [
            self.affine[axis, 3] + self.affine[axis, axis] * np.arange(count)
            for axis, count in enumerate(counts)
        ]


def sphere(x: float, y: float, z: float, radius_mm: float, suv: float, label: int = 1) -> Lesion:
    return Lesion((x, y, z), (radius_mm,) * 3, suv, label)


def both(*tissues: Tissue) -> tuple[Tissue, ...]:
    """Tissues of the right side, and their mirror images."""
    mirrored = (
        replace(tissue, center_mm=tuple(np.multiply(tissue.center_mm, (-1, 1, 1)).tolist()))
        for tissue in tissues
    )
    return *tissues, *mirrored


def ribs() -> Iterator[Tissue]:
    """Discs of bone, filled with muscle, within the chest's ellipsoid."""
    for z in range(-345, -590, -27):
        narrower = math.sqrt(1 - ((z + 470) / 215) ** 2)
        for a, b, kind in ((143, 92, BONE), (136, 85, MUSCLE)):
            yield Tissue((0, 0, z), (a * narrower, b * narrower, 5), *kind, cylinder=True)


def vertebrae() -> Iterator[Tissue]:
    """From the skull to the sacrum, along the curves of the spine."""
    for z in range(-195, -770, -26):
        y = float(np.interp(-z, (195, 300, 480, 680, 760), (-22, -38, -66, -50, -58)))
        size = float(np.interp(-z, (195, 760), (11, 22)))
        yield Tissue((0, y, z), (size, size * 0.85, 10.5), 230, 1.5, cylinder=True)
        yield Tissue((0, y - 1.6 * size, z), (size, size / 2, 8), 450, 0.9, cylinder=True)
        yield Tissue((0, y - 1.35 * size, z), (8, 7, 13), 30, 1.2, cylinder=True)  # cord


# A person of 1.75 m and 75 kg: z from the crown of the head, semi-axes, all in mm; x to the right.
# Later tissues lie on top of earlier ones.
FAT, MUSCLE, BONE, AIR, BLOOD = (-100, 0.3), (45, 0.6), (350, 1.0), (-950, 0.1), (42, 1.7)
"""HU and SUV."""

HEAD = (
    Tissue((0, 5, -116), (78, 98, 116), *MUSCLE),
    Tissue((0, 35, -172), (56, 66, 62), *MUSCLE),  # face
    Tissue((0, 2, -88), (73, 91, 80), 900, 0.8),  # skull
    Tissue((0, 2, -88), (66, 84, 72), 36, 9.0),  # cortex
    *both(Tissue((27, 2, -86), (21, 54, 38), 28, 4.0)),  # white matter
    Tissue((0, -46, -148), (46, 32, 24), 36, 7.5),  # cerebellum
    Tissue((0, 80, -166), (13, 22, 24), *AIR),  # nose
    *both(Tissue((56, 12, -186), (9, 14, 18), 30, 1.9)),  # parotid glands
    *both(Tissue((13, 24, -204), (7, 9, 11), 45, 3.0)),  # tonsils
)
ARMS = {
    "up": both(
        Tissue((150, -8, -120), (37, 42, 250), *FAT),
        Tissue((150, -8, -120), (30, 34, 245), *MUSCLE),
        Tissue((150, -8, -120), (11, 11, 230), *BONE),
    ),
    "down": both(
        Tissue((194, -20, -570), (34, 42, 260), *FAT),
        Tissue((194, -20, -570), (27, 34, 255), *MUSCLE),
        Tissue((194, -20, -570), (10, 10, 240), *BONE),
    ),
}
SKIN_AND_FAT = (
    Tissue((0, -8, -262), (60, 64, 62), *FAT, cylinder=True),  # neck
    *both(Tissue((112, -12, -350), (82, 62, 68), *FAT)),  # shoulders
    Tissue((0, 0, -470), (174, 127, 232), *FAT),  # chest
    Tissue((0, 0, -660), (167, 125, 245), *FAT),  # abdomen
    Tissue((0, -4, -830), (182, 125, 175), *FAT),  # pelvis
    *both(Tissue((88, -2, -1010), (90, 98, 260), *FAT)),  # thighs
)
MUSCLES = (
    Tissue((0, -8, -262), (52, 56, 66), *MUSCLE, cylinder=True),
    *both(Tissue((108, -12, -350), (70, 50, 56), *MUSCLE)),
    Tissue((0, 0, -470), (156, 107, 218), *MUSCLE),
    Tissue((0, 0, -660), (146, 103, 232), *MUSCLE),
    Tissue((0, -4, -830), (162, 103, 162), *MUSCLE),
    *both(Tissue((88, -2, -1010), (73, 80, 250), *MUSCLE)),
)
INNER = (
    *ribs(),
    *both(
        Tissue((72, 3, -425), (56, 77, 115), -820, 0.4),  # lungs
        Tissue((92, -28, -795), (13, 50, 60), *BONE),  # iliac wings
        Tissue((88, 0, -885), (23, 23, 23), *BONE),  # heads and shafts of the femurs
        Tissue((96, -4, -1000), (14, 14, 110), *BONE, cylinder=True),
    ),
    Tissue((0, -70, -815), (42, 18, 52), *BONE),  # sacrum
    *vertebrae(),
    Tissue((0, 14, -320), (9, 8, 95), *AIR, cylinder=True),  # trachea
    Tissue((0, 2, -388), (20, 38, 14), *BLOOD),  # arch of the aorta
    Tissue((-18, -38, -540), (11, 11, 150), *BLOOD, cylinder=True),
    Tissue((4, 18, -700), (112, 60, 105), -95, 0.4),  # mesentery
    Tissue((-62, 34, -562), (40, 40, 46), 25, 1.9),  # stomach, and air in it
    Tissue((-62, 56, -545), (20, 13, 16), *AIR),
    Tissue((72, 5, -575), (70, 78, 72), 58, 2.3),  # liver
    Tissue((10, 44, -548), (66, 38, 38), 58, 2.3),
    Tissue((-104, -34, -572), (30, 42, 52), 50, 1.9),  # spleen
    *both(
        Tissue((66, -54, -632), (25, 23, 52), 34, 4.5),  # kidneys
        Tissue((58, -48, -632), (10, 12, 24), 12, 16.0),
    ),
    Tissue((8, 46, -706), (72, 30, 46), 30, 1.4),  # bowel
    Tissue((0, 62, -655), (92, 18, 17), 15, 1.5),
    Tissue((102, 12, -705), (20, 25, 72), 10, 2.0),
    Tissue((-106, 2, -705), (17, 21, 88), 10, 1.6),
    Tissue((0, -46, -880), (17, 17, 40), 25, 1.8),
)


def scaled(tissues: Sequence[Tissue], xy: float, z: float) -> Iterator[Tissue]:
    """Tissues enlarged across and along the body."""
    for tissue in tissues:
        center_mm, semi_axes_mm = (
            (v[0] * xy, v[1] * xy, v[2] * z) for v in (tissue.center_mm, tissue.semi_axes_mm)
        )
        yield replace(tissue, center_mm=center_mm, semi_axes_mm=semi_axes_mm)


def anatomy(study: Study) -> tuple[Tissue, ...]:
    """The patient on the table, by height, weight and the uptake of heart and bladder."""
    frame, girth = study.frame, study.girth
    varying = (
        Tissue((-6, 50, -482), (38, 32, 42), *BLOOD),  # right heart
        Tissue((-44, 36, -480), (44, 40, 47), 48, study.heart_suv),
        Tissue((-38, 38, -474), (24, 22, 30), *BLOOD),
        Tissue((0, 18, -872), (36, 32, 32), 8, study.bladder_suv),
    )
    table = Tissue((0, -127 * girth - 12, 0), (200, 6, math.inf), -300, 0.0)
    return (
        table,
        *scaled((*ARMS.get(study.arms, ()), *SKIN_AND_FAT), girth, frame),
        *scaled(MUSCLES, (girth + frame) / 2, frame),
        *HEAD,
        *scaled((*INNER, *varying), frame, frame),
    )


DEMO_STUDIES = (
    Study(
        *("patient_01", "2024-03-01_PETCT", "DEMO^ANNA", "F", 68.5, 1.66, 251.3e6),
        injected=datetime(2024, 3, 1, 9, 12),
        scanned=datetime(2024, 3, 1, 10, 14, 31),
        lesions=(
            sphere(-82.3, 8.4, -378.2, 18.0, 9.0),
            sphere(77.7, 2.1, -548.3, 21.0, 7.0),
            Lesion((4.3, 31.6, -401.8), (16.0, 19.0, 26.0), 12.0),
        ),
        heart_suv=3.4,
    ),
    Study(  # the follow-up: two lesions smaller and paler, one gone
        *("patient_01", "2024-06-14_PETCT", "DEMO^ANNA", "F", 66.0, 1.66, 243.9e6),
        injected=datetime(2024, 6, 14, 8, 40),
        scanned=datetime(2024, 6, 14, 9, 41, 5),
        lesions=(sphere(-79.6, 9.2, -380.8, 15.0, 6.0), sphere(76.9, 1.2, -547.4, 17.0, 5.5)),
        heart_suv=3.0,
        bladder_suv=15.0,
        decay_correction="ADMIN",
        mask_drawn_on="CT",
    ),
    Study(  # two lesions 8 mm apart, one just above the lowermost slice
        *("patient_02", "2024-03-04_PETCT", "DEMO^BERT", "M", 98.0, 1.84, 318.0e6),
        injected=datetime(2024, 3, 4, 13, 5),
        scanned=datetime(2024, 3, 4, 14, 8, 50),
        lesions=(
            sphere(6.6, -5.2, -690.3, 16.0, 10.0),
            sphere(45.6, -5.2, -690.3, 15.0, 15.0),
            sphere(-82.1, 44.3, -957.9, 15.5, 7.0),
        ),
        heart_suv=2.5,
        mask="SEG",
    ),
    Study(
        *("patient_03", "2024-03-11_PETCT", "DEMO^CLARA", "F", 53.2, 1.58, 206.0e6),
        injected=datetime(2024, 3, 11, 10, 30),
        scanned=datetime(2024, 3, 11, 11, 29, 12),
        lesions=(
            Lesion((70.4, -2.7, -524.6), (24.0, 18.0, 20.0), 8.0),
            sphere(-70.2, -20.6, -388.3, 17.0, 11.0),
            sphere(1.7, 24.2, -640.1, 16.0, 6.5),
        ),
        arms="down",
        images="NIfTI",
        mask="NIfTI",
    ),
    Study(  # two labels, say two readers' classes
        *("patient_04", "2024-04-22_PETCT", "DEMO^DAVID", "M", 83.0, 1.78, 291.5e6),
        injected=datetime(2024, 4, 22, 7, 55),
        scanned=datetime(2024, 4, 22, 8, 57, 40),
        lesions=(
            sphere(80.6, 10.2, -400.4, 20.0, 13.0, label=1),
            sphere(-128.3, -8.8, -361.2, 16.0, 6.0, label=2),
            sphere(6.6, -22.9, -700.7, 17.0, 8.5, label=2),
        ),
        bladder_suv=30.0,
        units="GML",
        mask="NIfTI",
    ),
    Study(  # incomplete: nobody has drawn a mask yet
        *("patient_05", "2024-05-02_PETCT", "DEMO^EMIL", "M", 79.5, 1.80, 280.0e6),
        injected=datetime(2024, 5, 2, 11, 20),
        scanned=datetime(2024, 5, 2, 12, 21, 33),
        lesions=(sphere(60.3, 10.2, -590.7, 18.0, 9.0),),
        arms=None,
        mask=None,
    ),
)

SITES_MM = (
    *((85, 15, -380), (92, -18, -445), (-88, 10, -375), (-95, -28, -425)),  # lungs
    *((108, -2, -560), (40, 8, -600), (84, 44, -572)),  # liver
    *((4, 28, -408), (-128, -8, -355), (126, -8, -352)),  # nodes of mediastinum and armpits
    *((20, -14, -700), (-48, -10, -760), (-78, 46, -865)),  # nodes before the spine, of the pelvis
)
"""Where invented studies may have lesions, far enough apart; in a person of 1.75 m."""


def invented_studies() -> Iterator[Study]:
    """Studies without end after those of DEMO_STUDIES; every other patient has a follow-up."""
    for number in count(len({study.patient for study in DEMO_STUDIES}) + 1):
        random = np.random.default_rng((SEED, number))
        sex = str(random.choice(["F", "M"]))
        height_m = round(random.uniform(*{"F": (1.55, 1.75), "M": (1.68, 1.92)}[sex]), 2)
        weight_kg = round(height_m**2 * random.uniform(21, 29), 1)
        scanned = datetime(2024, 5, 6, 9) + timedelta(
            days=number, minutes=int(random.integers(400))
        )
        sites = random.choice(SITES_MM, random.integers(2, 6), replace=False)
        places_mm = (sites + random.uniform(-3, 3, sites.shape)) * height_m / 1.75
        lesions = tuple(
            sphere(*np.round(place_mm, 1).tolist(), round(radius_mm, 1), round(suv, 1))
            for place_mm, radius_mm, suv in zip(
                places_mm,
                np.minimum(random.uniform(14, 24, len(sites)), room_mm(places_mm)),
                random.uniform(6, 15, len(sites)),
                strict=True,
            )
        )
        first = Study(
            *(f"patient_{number:02d}", f"{scanned:%Y-%m-%d}_PETCT", f"DEMO^NO{number:02d}"),
            *(sex, weight_kg, height_m, round(weight_kg * 3.6e6)),
            injected=scanned - timedelta(minutes=int(random.integers(55, 70))),
            scanned=scanned,
            lesions=lesions,
            heart_suv=round(random.uniform(2, 3.5), 1),
            bladder_suv=round(random.uniform(12, 35), 1),
            arms="down" if weight_kg < 55 else "up",
            mask=str(random.choice(["RTSTRUCT", "SEG", "NIfTI"])),
        )
        yield first
        if number % 2 == 0:
            later = timedelta(days=90)
            yield replace(
                first,
                study=f"{scanned + later:%Y-%m-%d}_PETCT",
                injected=first.injected + later,
                scanned=scanned + later,
                lesions=tuple(
                    replace(
                        lesion,
                        semi_axes_mm=tuple(round(0.85 * a, 1) for a in lesion.semi_axes_mm),
                        suv=round(max(6.0, 0.7 * lesion.suv), 1),
                    )
                    for lesion in lesions[1:]
                ),
            )


def room_mm(places_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """The radius that spheres at these places (N, 3) may have and stay 8 mm apart."""
    apart_mm = np.linalg.norm(places_mm[:, None] - places_mm, axis=-1)
    return np.where(apart_mm > 0, apart_mm - 8, math.inf).min(axis=1) / 2


def studies(number: int) -> list[Study]:
    """The first studies of the demo: those of DEMO_STUDIES, then invented ones."""
    return list(islice(chain(DEMO_STUDIES, invented_studies()), number))


def ct_grid(matrix: int, slices: int, scan_mm: float = SCAN_MM) -> Grid:
    return Grid(matrix, slices, CT_FIELD_MM / matrix, scan_mm / slices, CT_CENTER_MM)


def pet_grid(matrix: int, slices: int, scan_mm: float = SCAN_MM) -> Grid:
    return Grid(matrix, slices, PET_FIELD_MM / matrix, scan_mm / slices, PET_CENTER_MM)


def sample(
    grid: Grid, regions: Sequence[Tissue | Lesion], quantity: str, outside: float = 0.0
) -> NDArray[np.float32]:
    """Value of ``quantity`` (hu, suv or label) at every voxel centre, (matrix, matrix, slices)."""
    volume = np.full((grid.matrix, grid.matrix, grid.slices), outside, np.float32, order="F")
    for region in regions:
        offsets = [
            (places_mm - center_mm) / semi_axis_mm
            for places_mm, center_mm, semi_axis_mm in zip(
                grid.voxel_centers_mm, region.center_mm, region.semi_axes_mm, strict=True
            )
        ]
        x, y, z = (np.flatnonzero(abs(offset) <= 1) for offset in offsets)
        if not (x.size and y.size and z.size):
            continue
        box = volume[x[0] : x[-1] + 1, y[0] : y[-1] + 1]
        in_plane = offsets[0][x, None] ** 2 + offsets[1][y] ** 2
        for k in z:
            reach = 1 if region.cylinder else 1 - offsets[2][k] ** 2
            box[in_plane <= reach, k] = getattr(region, quantity)
    return volume


def blurred(grid: Grid, volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """As a scanner of RESOLUTION_MM sees it: a Gaussian along each axis, the border repeated."""
    for axis, spacing_mm in enumerate((grid.pixel_mm, grid.pixel_mm, grid.slice_mm)):
        sigma = RESOLUTION_MM / math.sqrt(8 * math.log(2)) / spacing_mm
        reach = math.ceil(3 * sigma)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        weights = (weights / weights.sum()).astype(np.float32)
        width = [(reach, reach) if i == axis else (0, 0) for i in range(3)]
        padded = np.moveaxis(np.pad(volume, width, mode="edge"), axis, 0)
        length = volume.shape[axis]
        shifted = (weight * padded[i : i + length] for i, weight in enumerate(weights))
        volume = np.moveaxis(sum(shifted), 0, axis)
    return volume


def decay_reference(study: Study) -> datetime:
    """The moment whose activity the PET values tell."""
    return study.injected if study.decay_correction == "ADMIN" else study.scanned


def bq_per_ml_per_suv(study: Study) -> float:
    """Activity concentration of SUV 1: dose left at the reference time over body weight."""
    elapsed_s = (decay_reference(study) - study.injected).total_seconds()
    return study.dose_bq * math.exp(-DECAY_PER_S * elapsed_s) / (study.weight_kg * 1000)


def make_uid(study: Study, *names: object) -> str:
    return str(uid.generate_uid(entropy_srcs=[study.patient, study.study, *map(str, names)]))


def decimal(number: float) -> DSfloat:
    """A decimal string of at most 16 characters, as DICOM allows."""
    return DSfloat(float(number), auto_format=True)


def item(**attributes: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def stamp(dataset: Dataset, kind: str, moment: datetime) -> None:
    """Set <kind>Date and <kind>Time."""
    setattr(dataset, f"{kind}Date", f"{moment:%Y%m%d}")
    setattr(dataset, f"{kind}Time", f"{moment:%H%M%S}")


def dicom_file(
    study: Study, sop_class: str, modality: str, series_number: int, instance_number: int = 1
) -> Dataset:
    """What every DICOM file of a study has: patient, study, series, equipment, all invented."""
    dataset = item(
        SpecificCharacterSet="ISO_IR 192",
        SOPClassUID=sop_class,
        SOPInstanceUID=make_uid(study, modality, instance_number),
        AccessionNumber=f"A{study.scanned:%y%m%d%H%M}",
        Modality=modality,
        Manufacturer="Demo Scanners",
        ManufacturerModelName="Phantom 1",
        InstitutionName="Demo General Hospital",
        ReferringPhysicianName="DEMO^DOCTOR",
        StudyDescription="FDG PET/CT trunk",
        SeriesDescription=f"{modality} demo",
        PatientName=study.patient_name,
        PatientID=study.patient.replace("patient_", "DEMO-00"),
        PatientBirthDate="19600229",
        PatientSex=study.sex,
        PatientSize=study.height_m,
        PatientWeight=study.weight_kg,
        StudyInstanceUID=make_uid(study),
        SeriesInstanceUID=make_uid(study, modality),
        StudyID="1",
        SeriesNumber=series_number,
        InstanceNumber=instance_number,
        FrameOfReferenceUID=make_uid(study, "frame of reference"),
        PositionReferenceIndicator="",
    )
    for kind in ("Study", "Series", "Content"):
        stamp(dataset, kind, study.scanned)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return dataset


def put_image(dataset: Dataset, grid: Grid, k: int, stored: NDArray[np.float32]) -> Dataset:
    """Add slice ``k`` (upwards): its place and the (x, y) pixels, rounded to 16 bits."""
    first_voxel_mm = np.round(grid.affine @ (0, 0, k, 1), 6)
    dataset.ImagePositionPatient = [decimal(v) for v in first_voxel_mm[:3] * (-1, -1, 1)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PatientPosition = "HFS"
    dataset.SliceThickness = decimal(grid.slice_mm)
    dataset.PixelSpacing = [decimal(grid.pixel_mm)] * 2
    dataset.Rows = dataset.Columns = grid.matrix
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.clip(np.rint(stored), 0, 32767).astype("<u2").T.tobytes()
    return dataset


def ct_slice(study: Study, grid: Grid, k: int, hu: NDArray[np.float32]) -> Dataset:
    dataset = dicom_file(study, uid.CTImageStorage, "CT", 2, grid.slices - k)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.AcquisitionNumber = 1
    stamp(dataset, "Acquisition", study.scanned)
    dataset.KVP = 120
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    return put_image(dataset, grid, k, hu + 1024)


def pet_slice(study: Study, grid: Grid, k: int, values: NDArray[np.float32]) -> Dataset:
    """One PET slice; ``values`` in the study's units, corrected for decay to its reference."""
    instance = grid.slices - k
    dataset = dicom_file(study, uid.PositronEmissionTomographyImageStorage, "PT", 3, instance)
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.SeriesType = ["WHOLE BODY", "IMAGE"]
    dataset.NumberOfSlices, dataset.ImageIndex = grid.slices, instance
    dataset.CountsSource, dataset.CollimatorType = "EMISSION", "NONE"
    dataset.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "RAN", "DECY"]
    dataset.PatientOrientationCodeSequence = dataset.PatientGantryRelationshipCodeSequence = []

    # A frame's values hold for the moment of its average count rate, a little before its middle.
    acquired = study.scanned + timedelta(seconds=k // BED_SLICES * BED_STEP_S)
    decays = DECAY_PER_S * FRAME_DURATION_S
    mean_rate_s = math.log(decays / (1 - math.exp(-decays))) / DECAY_PER_S
    reference_s = (acquired - decay_reference(study)).total_seconds() + mean_rate_s
    stamp(dataset, "Acquisition", acquired)
    dataset.ActualFrameDuration = round(FRAME_DURATION_S * 1000)
    dataset.FrameReferenceTime = decimal(reference_s * 1000)
    dataset.DecayCorrection = study.decay_correction
    dataset.DecayFactor = decimal(math.exp(DECAY_PER_S * reference_s))
    fluorine = item(CodeValue="77004003", CodingSchemeDesignator="SCT", CodeMeaning="^18^Fluorine")
    tracer = item(
        Radiopharmaceutical="FDG",
        RadiopharmaceuticalStartTime=f"{study.injected:%H%M%S}",
        RadiopharmaceuticalStartDateTime=f"{study.injected:%Y%m%d%H%M%S}",
        RadionuclideTotalDose=study.dose_bq,
        RadionuclideHalfLife=F18_HALF_LIFE_S,
        RadionuclideCodeSequence=[fluorine],
    )
    dataset.RadiopharmaceuticalInformationSequence = [tracer]

    dataset.Units = study.units
    if study.units == "GML":
        dataset.SUVType = "BW"
    # Every slice fills the 16 bits in its own way, so no two slices share a slope.
    slope = decimal(max(values.max(), 1e-6) / (32767 - k))
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
    return put_image(dataset, grid, k, values / slope)


def outline(lesion: Lesion, z_mm: float) -> NDArray[np.float64]:
    """The ellipse in which a lesion meets a slice, (points, 3) [mm, RAS]; empty if it does not."""
    (x0, y0, z0), (a, b, c) = lesion.center_mm, lesion.semi_axes_mm
    if abs(z_mm - z0) >= c:
        return np.empty((0, 3))
    scale = math.sqrt(1 - ((z_mm - z0) / c) ** 2)
    angles = np.linspace(0, 2 * math.pi, CONTOUR_POINTS, endpoint=False)
    ellipse = x0 + a * scale * np.cos(angles), y0 + b * scale * np.sin(angles)
    return np.column_stack([*ellipse, np.full(CONTOUR_POINTS, z_mm)])


def rtstruct(study: Study, images: Sequence[Dataset]) -> Dataset:
    """Lesions as regions of an RTSTRUCT, drawn on each slice of ``images`` they meet."""
    dataset = dicom_file(study, uid.RTStructureSetStorage, "RTSTRUCT", 4)
    dataset.StructureSetLabel = "Lesions"
    dataset.ApprovalStatus = "UNAPPROVED"
    stamp(dataset, "StructureSet", study.scanned)
    frame, image_series = dataset.FrameOfReferenceUID, images[0].SeriesInstanceUID
    references = [
        item(ReferencedSOPClassUID=i.SOPClassUID, ReferencedSOPInstanceUID=i.SOPInstanceUID)
        for i in images
    ]
    drawn_on = item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management
        ReferencedSOPInstanceUID=dataset.StudyInstanceUID,
        RTReferencedSeriesSequence=[
            item(SeriesInstanceUID=image_series, ContourImageSequence=references)
        ],
    )
    dataset.ReferencedFrameOfReferenceSequence = [
        item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[drawn_on])
    ]
    regions, contours, observations = [], [], []
    for number, lesion in enumerate(study.lesions, start=1):
        region = item(ROINumber=number, ROIName=f"Lesion {number}", ROIGenerationAlgorithm="MANUAL")
        region.ReferencedFrameOfReferenceUID = frame
        polygons = [
            item(
                ContourImageSequence=[reference],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=CONTOUR_POINTS,
                ContourData=[f"{value:.4f}" for value in (points_mm * (-1, -1, 1)).ravel()],
            )
            for image, reference in zip(images, references, strict=True)
            if len(points_mm := outline(lesion, float(image.ImagePositionPatient[2])))
        ]
        observation = item(ObservationNumber=number, RTROIInterpretedType="GTV", ROIInterpreter="")
        observation.ReferencedROINumber = number
        regions.append(region)
        contours.append(item(ReferencedROINumber=number, ContourSequence=polygons))
        observations.append(observation)
    dataset.StructureSetROISequence = regions
    dataset.ROIContourSequence = contours
    dataset.RTROIObservationsSequence = observations
    return dataset


def dicom_seg(study: Study, images: Sequence[Dataset], labels: NDArray[np.float32]) -> Dataset:
    """All lesions as one binary segment on the grid of ``images`` (top slice first)."""
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lesions",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type="MANUAL",
    )
    dataset = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=labels.T[::-1] > 0,
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=make_uid(study, "SEG"),
        series_number=4,
        sop_instance_uid=make_uid(study, "SEG", 1),
        instance_number=1,
        manufacturer="Demo Scanners",
        manufacturer_model_name="Phantom 1",
        software_versions="1",
        device_serial_number="1",
    )
    # highdicom notes the time and makes up UIDs: the demo has to be the same on every day.
    stamp(dataset, "InstanceCreation", study.scanned)
    stamp(dataset, "Content", study.scanned)
    dataset.pop("ContributingEquipmentSequence", None)
    for element in dataset.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = make_uid(study, "SEG dimensions")
    return dataset


def write_dicom(folder: Path, datasets: Sequence[Dataset]) -> None:
    folder.mkdir(parents=True)
    for dataset in datasets:
        name = f"IM{dataset.InstanceNumber:04d}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True)


def write_nifti(path: Path, volume: NDArray[np.generic], grid: Grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, grid.affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def write_study(out: Path, study: Study, ct: Grid, pet: Grid, noise: str = "none") -> None:
    """Write one study below ``out``.

    ``noise`` is none, pet (as coarse as the PET's blur) or all: of the CT, too, air included.
    The mask is always that of the true lesions.
    """
    regions = [*anatomy(study), *study.lesions]
    random = np.random.default_rng((SEED, zlib.crc32(f"{study.patient}/{study.study}".encode())))
    values = blurred(pet, sample(pet, regions, "suv"))
    if noise != "none":
        grain = blurred(pet, random.standard_normal(values.shape, np.float32))
        values *= 1 + NOISE_SUV / grain.std() * grain
    if study.units == "BQML":
        values *= bq_per_ml_per_suv(study)
    hu = sample(ct, regions, "hu", outside=-1000.0)
    if noise == "all":
        hu += NOISE_HU * random.standard_normal(hu.shape, np.float32)
    labels = sample(pet, study.lesions, "label")
    downwards = range(ct.slices - 1, -1, -1)
    pet_slices = [pet_slice(study, pet, k, values[..., k]) for k in downwards]
    folder = out / study.patient / study.study

    if study.images == "NIfTI":
        write_nifti(folder / "CT.nii.gz", np.rint(hu).astype(np.int16), ct)
        write_nifti(folder / "PET.nii.gz", values, pet)
        pet_slices[0].save_as(folder / "PET_header.dcm", enforce_file_format=True)
    else:
        ct_slices = [ct_slice(study, ct, k, hu[..., k]) for k in downwards]
        write_dicom(folder / "CT", ct_slices)
        write_dicom(folder / "PET", pet_slices)
    if study.mask == "RTSTRUCT":
        drawn_on = ct_slices if study.mask_drawn_on == "CT" else pet_slices
        write_dicom(folder / "MASK", [rtstruct(study, drawn_on)])
    elif study.mask == "SEG":
        write_dicom(folder / "MASK", [dicom_seg(study, pet_slices, labels)])
    elif study.mask == "NIfTI":
        name = "MASK.nii.gz" if study.images == "NIfTI" else "MASK/lesions.nii.gz"
        write_nifti(folder / name, labels.astype(np.uint8), pet)


def write_demo(
    out: Path,
    *,
    number: int = len(DEMO_STUDIES),
    matrix_ct: int = 128,
    matrix_pet: int = 128,
    slices: int = 200,
    noise: str = "pet",
) -> None:
    """Write the demo's first studies into the project folder ``out``."""
    ct, pet = ct_grid(matrix_ct, slices), pet_grid(matrix_pet, slices)
    for study in studies(number):
        write_study(out, study, ct, pet, noise)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new or empty project folder")
    parser.add_argument(
        "--studies", dest="number", type=int, default=6, metavar="N", help="how many (default: 6)"
    )
    parser.add_argument("--matrix-ct", type=int, default=128, metavar="N", help="128; real: 512")
    parser.add_argument("--matrix-pet", type=int, default=128, metavar="N", help="128; real: 400")
    parser.add_argument("--slices", type=int, default=200, metavar="N", help="200; real: 326")
    parser.add_argument(
        "--noise",
        choices=("none", "pet", "all"),
        default="pet",
        help="of the PET (default), or CT, too (15 HU), air included; always the same",
    )
    options = parser.parse_args(argv)
    if options.number < 1:
        parser.error("--studies: at least one")
    if min(options.matrix_ct, options.matrix_pet) < 64 or options.slices < FEWEST_SLICES:
        parser.error(f"matrices need at least 64 pixels and scans {FEWEST_SLICES} slices")
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty folder: name another")
    try:
        write_demo(**vars(options))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    complete = [study for study in studies(options.number) if study.mask]
    print(f"{options.number} studies, {len(complete)} with a mask -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
