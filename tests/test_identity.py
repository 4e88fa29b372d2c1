"""No patient's identity leaves the raw project but in the private mapping.

Distinctive strings are planted wherever a name, an id, a date or a UID can stand: every text
attribute of the DICOM dictionary, nested and private ones, every string of NIfTI headers,
extensions, gzip headers, names of folders and files. The chain runs with failures of every kind
along the way, and all that it has written, said and left behind is searched, decompressed.
"""

import base64
import gzip
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import h5py
import nibabel
import PIL.Image
import pydicom
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian
from tiny_studies import GRID, STUDIES, write_raw

import createproject
import preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[1]

# --- what is planted -------------------------------------------------------------------------

MARK = "QZXJVKW"
"""In every planted ASCII text; a number follows."""

UID_ROOT = "1.3.6.1.4.1.7349261587"
INJECTED = datetime(1893, 4, 17, 4, 17, 29, 271828)
SCANNED = datetime(1893, 4, 17, 5, 17, 29, 271828)
BORN = datetime(1867, 11, 29)
NAME_IN = {
    "ISO_IR 192": "謎々渡辺",
    "\\ISO 2022 IR 87": "花子々山本",
    "GB18030": "欧阳娜娜",
    "\\ISO 2022 IR 149": "김희중옥",
    "ISO_IR 144": "Владимира",
    "ISO_IR 126": "Ξανθίππη",
    "ISO_IR 101": "Łąkowska",
    "ISO_IR 100": "Zoë_Müßig",
}
"""Non-ASCII names by the DICOM character set that they are written in."""
NON_ASCII = tuple(NAME_IN.values())

TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
PLANTED_VRS = TEXT | {"DA", "DT", "TM", "UI"}
MEANINGFUL = {
    "Modality", "ImageType", "SeriesType", "Units", "DecayCorrection", "SUVType", "CorrectedImage",
    "PatientSex", "PhotometricInterpretation", "SpecificCharacterSet", "SegmentationType",
    "ContourGeometricType", "LossyImageCompression", "TimezoneOffsetFromUTC",
    "RTROIInterpretedType", "DimensionOrganizationType", "PixelPresentation",
    "VolumetricProperties",
}  # fmt: skip
"""Attributes whose values steer the conversion."""


def moments(*when: datetime) -> list[str]:
    """Spellings of dates and times of day."""
    return [f"{m:{form}}" for m in when for form in ("%Y%m%d", "%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y")]


NEEDLES = [MARK, MARK.lower(), UID_ROOT, UID_ROOT.rpartition(".")[2], *NON_ASCII]
NEEDLES += moments(SCANNED, BORN)
NEEDLES += [f"{m:{form}}" for m in (INJECTED, SCANNED) for form in ("%H%M%S.%f", "%H:%M:%S")]


def spellings(needle: str) -> Iterator[bytes]:
    """Every form in which a string may stand in a file."""
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, needle)
        yield from (text.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"))
        yield json.dumps(text)[1:-1].encode()
        yield text.encode("ascii", "backslashreplace")
        yield text.encode("ascii", "xmlcharrefreplace")
        yield repr(text.encode())[2:-1].encode()
        yield "".join(f"%{byte:02X}" for byte in text.encode()).encode()
        for code in (
            "latin-1",
            "iso8859-5",
            "iso8859-7",
            "gb18030",
            "shift-jis",
            "euc-jp",
            "euc-kr",
        ):
            try:
                yield text.encode(code)
            except UnicodeEncodeError:
                continue
    for dicom_set in ("iso2022_jp_2", "iso2022_jp", "iso2022_kr"):
        yield needle.encode(dicom_set, "ignore").strip(b"\x1b$B(J")


HAYSTACK = re.compile(
    b"|".join(
        re.escape(form) for form in sorted({f for n in NEEDLES for f in spellings(n) if len(f) > 5})
    )
)


class Garden:
    """Hands out planted values: one for each study and attribute, and counts them."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], str] = {}
        self.name = ""

    def text(self, *place: str) -> str:
        """A text that is this place's alone."""
        return self.values.setdefault(place, f"{MARK}{len(self.values):05d}")

    def value(self, vr: str, *place: str) -> str:
        """A value of a DICOM representation."""
        match vr:
            case "UI":
                number = len(self.values)
                return self.values.setdefault(place, f"{UID_ROOT}.{number}")
            case "DA":
                return f"{BORN if 'Birth' in place[-1] else SCANNED:%Y%m%d}"
            case "TM":
                return f"{INJECTED if 'Radiopharm' in place[-1] else SCANNED:%H%M%S.%f}"
            case "DT":
                return f"{INJECTED if 'Radiopharm' in place[-1] else SCANNED:%Y%m%d%H%M%S.%f}"
            case "PN":
                return f"{self.text(*place)}^{self.name}"
        return self.text(*place)


def plant(dataset: pydicom.Dataset, garden: Garden, study: str, *, everywhere: bool) -> None:
    """Replace every telling value of a dataset; `everywhere` adds all others that there are."""
    for parent, element in list(_elements(dataset)):
        keyword, old = element.keyword, element.value
        if element.VR not in PLANTED_VRS or keyword in MEANINGFUL or not old:
            continue
        if element.VR == "UI":
            if not str(old).startswith("1.2.840.10008"):
                parent[element.tag].value = garden.value("UI", study, str(old))
        else:
            parent[element.tag].value = garden.value(element.VR, study, keyword)
    if everywhere:
        _add_all(dataset, garden, study)
        item = pydicom.Dataset()
        _add_all(item, garden, f"{study}, nested")
        for keyword in (
            "RequestAttributesSequence",
            "ReferencedStudySequence",
            "ConceptNameCodeSequence",
        ):
            outer = pydicom.Dataset()
            setattr(outer, keyword, [item])
            item = outer
        dataset.update(item)
        _add_private(dataset, garden, study)


def _elements(dataset: pydicom.Dataset) -> Iterator[tuple[pydicom.Dataset, pydicom.DataElement]]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)
        else:
            yield dataset, element


def _add_all(dataset: pydicom.Dataset, garden: Garden, study: str) -> None:
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        absent = tag >> 16 > 0x0006 and tag not in dataset and keyword not in MEANINGFUL
        if absent and vr in PLANTED_VRS and keyword:
            dataset.add_new(tag, vr, garden.value(vr, study, keyword))


def _add_private(dataset: pydicom.Dataset, garden: Garden, study: str) -> None:
    block = dataset.private_block(0x0011, garden.text(study, "private creator"), create=True)
    item = pydicom.Dataset()
    for number, vr in enumerate(sorted(PLANTED_VRS)):
        block.add_new(number, vr, garden.value(vr, study, f"private {vr}"))
        item.add_new(
            0x00130000 | 0x1000 | number, vr, garden.value(vr, study, f"private item {vr}")
        )
    for number, vr in ((0x50, "UN"), (0x51, "OB")):
        block.add_new(number, vr, f"{garden.text(study, vr)} {NON_ASCII[1]}".encode())
    item.add_new(0x00130010, "LO", garden.text(study, "private item creator"))
    block.add_new(0x60, "SQ", [item])


def gzipped(raw: bytes, garden: Garden, study: str) -> bytes:
    """Compress with an extra field, a name, a comment and a time."""
    extra, name, comment = (
        garden.text(study, "gzip", f).encode() for f in ("extra", "name", "comment")
    )
    plain = gzip.compress(raw, mtime=0)
    fields = struct.pack("<H", len(extra)) + extra + name + b"\0" + comment + b"\0"
    return b"\x1f\x8b\x08\x1c" + struct.pack("<IBB", 0x12345678, 0, 3) + fields + plain[10:]


def plant_nifti(path: Path, garden: Garden, study: str) -> None:
    """Plant every string of a NIfTI header, extensions and the gzip header."""
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        size = image.header[field].dtype.itemsize
        image.header[field] = garden.text(study, path.name, field).encode()[:size]
    for code in ("comment", "afni", "dicom"):
        text = f"<xml>{garden.text(study, path.name, code)} {' '.join(NON_ASCII)}</xml>".encode()
        content = pydicom.Dataset() if code == "dicom" else text
        if code == "dicom":
            content.PatientName = garden.text(study, path.name, "in the extension")
            image.header.extensions.append(nibabel.nifti1.Nifti1DicomExtension(2, content))
        else:
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, content))
    path.write_bytes(gzipped(image.to_bytes(), garden, study))


# --- the raw project -------------------------------------------------------------------------


def ct_series_twice(study: Path) -> None:
    """A second reconstruction: nobody said which is meant."""
    shutil.copytree(study / "CT", study / "CT2")
    for path in (study / "CT2").iterdir():
        change(path, SeriesInstanceUID=f"{UID_ROOT}.77777")


def header_twice(study: Path) -> None:
    shutil.copy(study / "PET_header.dcm", study / "other.dcm")
    change(study / "other.dcm", SeriesInstanceUID=f"{UID_ROOT}.77778")


def change(path: Path, **values: object) -> None:
    """Set attributes of a DICOM file; bytes are written as they are."""
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        tag = Tag(keyword)
        if isinstance(value, bytes):
            vr = DicomDictionary[int(tag)][0].split()[0]
            dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)


def first(study: Path, pattern: str) -> Path:
    return sorted(study.glob(pattern))[0]


def cut(pattern: str, fraction: float):
    def damage(study: Path) -> None:
        path = first(study, pattern)
        path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])

    return damage


def each(pattern: str, **values: object):
    """Change every file that fits."""

    def damage(study: Path) -> None:
        for path in study.glob(pattern):
            change(path, **values)

    return damage


def text_for_nifti(study: Path) -> None:
    first(study, "*_ct.nii.gz").write_bytes(f"{MARK}00000 {NON_ASCII[2]} ".encode() * 100)


def unfinished_sequence(study: Path) -> None:
    """pydicom warns of it and names the file."""
    path = first(study, "CT/*")
    content = path.read_bytes()
    opening = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    path.write_bytes(content + opening + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF))


def unknown_compression(study: Path) -> None:
    path = first(study, "CT/*")
    known = ExplicitVRLittleEndian.encode()
    content = path.read_bytes()
    assert known in content
    path.write_bytes(content.replace(known, f"{UID_ROOT}.5".encode()[: len(known)]))


def undecodable_names(study: Path) -> None:
    for path in study.glob("CT/*"):
        change(
            path, SpecificCharacterSet=b"ISO_IR 192", PatientName=b"\xff\xfe" + MARK.encode() + b" "
        )


PLANTED_TEXT = f"{MARK}99999 ".encode()
FAILURES = {
    "two CT series": ("rtstruct", ct_series_twice),
    "two headers": ("nifti", header_twice),
    "damaged header of a slice": ("rtstruct", cut("PET/*", 0.4)),
    "truncated pixels": ("rtstruct", cut("CT/*", 0.99)),
    "truncated mask": ("seg", cut("MASK/*", 0.7)),
    "truncated NIfTI": ("nifti", cut("*_pet.nii.gz", 0.7)),
    "text for NIfTI": ("nifti", text_for_nifti),
    "no mask": ("seg", lambda study: shutil.rmtree(study / "MASK")),
    "mask of another patient": ("seg", each("MASK/*", PatientID=f"{MARK}88888")),
    "mask in another frame": ("seg", each("MASK/*", FrameOfReferenceUID=f"{UID_ROOT}.88")),
    "wrong units": ("rtstruct", each("PET/*", Units="PROPCNTS")),
    "a name for units": ("rtstruct", each("PET/*", Units=f"{MARK}99998")),
    "a name for a decay correction": ("rtstruct", each("PET/*", DecayCorrection=f"{MARK}99997")),
    "a name for a weight": ("rtstruct", each("PET/*", PatientWeight=PLANTED_TEXT)),
    "a name for a time": ("rtstruct", each("PET/*", SeriesTime=PLANTED_TEXT)),
    "a name for a date": ("rtstruct", each("PET/*", SeriesDate=PLANTED_TEXT)),
    "a name for a size": ("rtstruct", each("PET/*", PatientSize=PLANTED_TEXT)),
    "a name for a place": ("rtstruct", each("CT/*", ImagePositionPatient=PLANTED_TEXT)),
    "a name for a slope": ("rtstruct", each("CT/*", RescaleSlope=PLANTED_TEXT)),
    "a name for a spacing": ("rtstruct", each("PET/*", PixelSpacing=PLANTED_TEXT)),
    "a name for a number of frames": ("seg", each("MASK/*", NumberOfFrames=PLANTED_TEXT)),
    "a name for a kind": ("seg", each("MASK/*", SegmentationType=f"{MARK}99996")),
    "a UID for a compression": ("rtstruct", unknown_compression),
    "a name for a character set": ("rtstruct", each("CT/*", SpecificCharacterSet=PLANTED_TEXT)),
    "undecodable names": ("rtstruct", undecodable_names),
    "unfinished sequence": ("rtstruct", unfinished_sequence),
}


@pytest.fixture(scope="module")
def garden() -> Garden:
    return Garden()


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, garden: Garden) -> Path:
    """A raw project of sound studies and failing ones, full of planted strings."""
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder / "templates", injected=INJECTED, scanned=SCANNED)
    for name in STUDIES:
        plant_study(folder / "templates" / name / "1", garden, name)
    raw = folder / f"{MARK} hospital {NON_ASCII[5]}" / "raw"
    cases = {**{f"sound {name}": (name, lambda study: None) for name in STUDIES}, **FAILURES}
    for number, (name, (template, damage)) in enumerate(cases.items()):
        patient = f"{garden.text(name, 'patient folder')} {NON_ASCII[number % len(NON_ASCII)]}"
        study = raw / patient / f"{SCANNED:%Y-%m-%d} {garden.text(name, 'study folder')}"
        shutil.copytree(folder / "templates" / template / "1", study)
        damage(study)
    shutil.rmtree(folder / "templates")
    return raw


def plant_study(study: Path, garden: Garden, name: str) -> None:
    """Plant all files of a study and give them planted names."""
    for folder in [study, *(path for path in study.iterdir() if path.is_dir())]:
        for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
            if path.name.endswith(".nii.gz"):
                plant_nifti(path, garden, name)
                token = garden.text(name, path.name, "file name")
                path.rename(folder / f"{token}_{NON_ASCII[4]}_{path.name.lower()}")
            else:
                dataset = pydicom.dcmread(path)
                character_set = list(NAME_IN)[number % len(NAME_IN)]
                dataset.SpecificCharacterSet = character_set.split("\\")
                garden.name = NAME_IN[character_set]
                plant(dataset, garden, name, everywhere=number == 0)
                dataset.save_as(path)


# --- the search ------------------------------------------------------------------------------


def contents(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes of a file and of all that is stored in it, decompressed."""
    yield name, content
    if content.startswith(b"\x1f\x8b"):
        yield from contents(f"{name} inflated", zlib.decompressobj(31).decompress(content))
    elif zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                yield name, member.filename.encode() + member.comment + member.extra
                yield from contents(f"{name}:{member.filename}", archive.read(member))
    elif content.startswith(b"PK"):  # left behind unfinished: what there is of its members
        for start in re.finditer(rb"\x1f\x8b\x08", content):
            with suppress(zlib.error):
                yield from contents(f"{name}, a piece", content[start.start() :])
    elif content.startswith(b"\x89HDF"):
        with h5py.File(io.BytesIO(content)) as file:
            yield from of_hdf5(name, file)
    elif content.startswith((b"\x89PNG", b"GIF8")):
        with PIL.Image.open(io.BytesIO(content)) as picture:
            yield name, repr(picture.info).encode() + picture.tobytes()
    elif b"<html" in content[:1000]:
        for picture in re.findall(rb";base64,([A-Za-z0-9+/=]+)", content):
            yield from contents(f"{name}, a picture", base64.b64decode(picture))


def of_hdf5(name: str, file: h5py.File) -> Iterator[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        found.append((name, path.encode()))
        for key, value in item.attrs.items():
            found.append((f"{name}:{path}@{key}", f"{key} {value!r}".encode()))
        if isinstance(item, h5py.Dataset):
            values = item[()]
            raw = repr(values.tolist()).encode() if values.dtype.kind == "O" else values.tobytes()
            found.append((f"{name}:{path}", raw))

    visit("/", file)
    file.visititems(visit)
    yield from found


def planted(text: str) -> list[bytes]:
    """Return the planted strings in a text."""
    return [hit.group() for hit in HAYSTACK.finditer(text.encode())]


def pieces_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """As `contents`; nothing for folders."""
    if path.is_file():
        yield from contents(path.name, path.read_bytes())


def leaks(root: Path, but: str = "") -> list[str]:
    """Return where below a folder, file names included, planted strings are found."""
    found = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        pieces = [("file name", os.fsencode(name))]
        if not (but and name.endswith(but)):
            pieces += pieces_of(path)
        found += [
            f"{where}: {hit.group()!r}" for where, b in pieces for hit in HAYSTACK.finditer(b)
        ]
    return found


# --- the chain -------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """What is told to scripts: to warn of everything, and to keep temporary files in sight."""
    (folder / "tmp").mkdir(exist_ok=True)
    said = {"PYTHONWARNINGS": "always", "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **said}


def run(folder: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run a script as a user does; what it says is kept in the folder."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    said = ["--log-file", f"{script}.log", "-vv", "--debug"]
    done = subprocess.run(
        [*command, *said], cwd=folder, env=environment(folder), capture_output=True, timeout=600
    )
    for stream, text in (("stdout", done.stdout), ("stderr", done.stderr)):
        with open(folder / f"{script}.{stream}", "ab") as file:
            file.write(text)
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, hospital: Path) -> Path:
    """All that the chain has written and said."""
    out = tmp_path_factory.mktemp("out")
    assert run(out, "createproject", hospital, "-o", "project.zip", "--dry-run").returncode == 3
    # Its table is for those who see the raw project; what it logs is not.
    assert MARK in (out / "createproject.stdout").read_text()
    (out / "createproject.stdout").unlink()
    assert run(out, "createproject", hospital, "-o", "project.zip", "-j", 2).returncode == 3
    more = ["--save-nifti", "nifti", "--measures", "measures.csv", "--report", "report.html"]
    more += [*GRID, "-j", 2]
    assert run(out, "preprocessing", "project.zip", "-o", "3d.h5", *more).returncode == 0
    damage_member(out / "project.zip", out / "damaged.zip", "_ct.nii.gz")
    assert run(out, "preprocessing", "damaged.zip", "-o", "damaged.h5", *GRID).returncode == 3
    (out / "damaged.zip").unlink()
    merging = ["-o", "all.h5", "--splits", 2, "--splits-dir", "splits"]
    assert run(out, "mergeh5", "3d.h5", *merging).returncode == 0
    assert run(out, "mergeh5", "project.zip", *merging).returncode == 1
    pictures = ["--gif", "gif", "--png", "png", "--angles", 0, 180, 45]
    assert run(out, "project_2d", "all.h5", "-o", "2d.h5", *pictures).returncode == 0
    assert run(out, "project_2d", "all.h5", "-o", "stack.h5", "--stack").returncode == 0
    return out


def damage_member(sound: Path, damaged: Path, ending: str) -> None:
    """Copy a zip with one bit flipped in the middle of the values of its first such member."""
    content = bytearray(sound.read_bytes())
    with zipfile.ZipFile(sound) as archive:
        member = next(each for each in archive.infolist() if each.filename.endswith(ending))
    begin = content.index(b"\x1f\x8b", member.header_offset)
    content[begin + member.compress_size // 2] ^= 1
    damaged.write_bytes(content)


def test_planted_strings_are_found_where_they_were_planted(hospital, garden):
    """Else the search below would prove nothing."""
    raw = b"\0".join(
        piece
        for path in sorted(hospital.rglob("*"))
        for _, piece in [("", os.fsencode(path)), *pieces_of(path)]
    )
    assert len(garden.values) > 5000
    print(f"{len(garden.values)} strings planted")
    missing = [value for value in garden.values.values() if value.encode() not in raw]
    # Short fields hold only the beginning of a value.
    assert [value for value in missing if value.encode()[:10] not in raw] == []
    for name in NON_ASCII:
        assert any(form in raw for form in spellings(name)), name
    for when in moments(SCANNED, BORN)[::4]:
        assert when.encode() in raw


def test_sound_studies_are_converted_and_each_failure_has_its_reason(written, hospital):
    """Else nothing would have been at risk."""
    said = (written / "createproject.stdout").read_text().splitlines()[-1]
    assert said.startswith(f"{3 + len(FAILURES)} studies: ")
    log = (written / "createproject.stderr").read_text()
    assert len(set(re.findall(r"^error: (\w{10}): ", log, re.MULTILINE))) >= len(FAILURES) - 4
    mapping = (written / "project_mapping.csv").read_bytes()
    assert mapping.count(MARK.encode()) > 2 * len(FAILURES)
    assert (written / "project_mapping.csv").stat().st_mode & 0o777 == 0o600


def test_no_planted_string_is_in_anything_written_or_said(written):
    assert len(list(written.rglob("*"))) > 40
    assert {path.suffix for path in written.rglob("*")} >= {
        *(".zip", ".h5", ".csv", ".html", ".gz", ".txt", ".gif", ".png"),
        *(".log", ".stdout", ".stderr"),
    }
    assert leaks(written, but="_mapping.csv") == []


@pytest.mark.parametrize(
    "options",
    [
        "--roi nothing --suv-type lbm-janma --strict --tracer 5",
        "--ct *[0-9]* --pet nothing --mask *.dcm* --dry-run",
        "--pet-units suv --trust-geometry --allow-empty-mask --dask local",
    ],
    ids=["choices", "patterns", "cluster"],
)
def test_no_option_makes_a_run_tell(hospital, tmp_path, options):
    """Messages of options, and a cluster's own, name what they found by its kind alone."""
    done = run(tmp_path, "createproject", hospital, "-o", "p.zip", "-j", 2, *options.split())
    assert done.returncode == 3, done.stderr
    assert f"{3 + len(FAILURES)} studies" in done.stdout.decode().splitlines()[-1]
    if "--dry-run" in options:  # which names candidates to those who see the raw project
        (tmp_path / "createproject.stdout").unlink()
    assert leaks(tmp_path, but="_mapping.csv") == []


# --- what is left and said when it goes wrong ------------------------------------------------


def test_neither_leftovers_of_a_killed_run_nor_its_processes_tell(hospital, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "createproject.py"),
        str(hospital),
        "-o",
        "p.zip",
        "-j",
        "2",
    ]
    titles: set[bytes] = set()
    with open(tmp_path / "stderr", "wb") as said:
        running = subprocess.Popen(
            command, cwd=tmp_path, env=environment(tmp_path), stderr=said, start_new_session=True
        )
        while running.poll() is None and not list(tmp_path.glob("p.zip.parts/*.zip")):
            titles |= process_titles(running.pid)
            time.sleep(0.005)
        titles |= process_titles(running.pid)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert list(tmp_path.glob("p.zip.parts/*"))
    assert leaks(tmp_path) == []
    # A worker just forked has its parent's command line, the user's own words.
    assert titles - {"\0".join(command).encode() + b"\0", b""} == set()


def process_titles(group: int) -> set[bytes]:
    """Command lines of the processes of a group, and of their threads the names."""
    titles = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                titles.add((process / "cmdline").read_bytes())
                assert planted((process / "comm").read_text()) == []
        except (ProcessLookupError, FileNotFoundError):
            continue
    return titles


class Surprise(Exception):
    """An error nobody has thought of; its text quotes a header."""

    def __init__(self) -> None:
        super().__init__(f"could not convert {MARK}12345 {NON_ASCII[0]} in /raw/{MARK}12345/x.dcm")


def fail(*arguments: object, **options: object) -> None:
    try:
        raise KeyError(f"{MARK}54321")
    except KeyError as error:
        raise Surprise from error


def spoken(capfd: pytest.CaptureFixture[str], folder: Path) -> str:
    said = capfd.readouterr()
    return said.out + said.err + (folder / "log").read_text()


@pytest.fixture
def ward(hospital, garden, tmp_path) -> Path:
    """A raw project of the sound studies alone."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in STUDIES:
        patient = next(hospital.glob(f"{garden.text(f'sound {name}', 'patient folder')}*"))
        (folder / patient.name).symlink_to(patient)
    return folder


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_text_of_an_unexpected_error_in_a_study_is_dropped(
    ward, tmp_path, monkeypatch, capfd, jobs
):
    monkeypatch.setattr("common.raw.study.read_study", fail)
    said = ["-vv", "--debug", "--log-file", str(tmp_path / "log")]
    output = ["-o", str(tmp_path / "p.zip"), "-j", jobs]
    assert createproject.main([str(ward), *output, *said]) == 3
    text = spoken(capfd, tmp_path)
    assert text.count("error: ") == len(STUDIES)
    assert text.count("unexpected Surprise") == 2 * len(STUDIES), "on stderr and in the log"
    assert f"in {fail.__name__}" in text, "a traceback without its text helps to debug"
    assert planted(text) == []


@pytest.mark.parametrize("step", ["pseudonymised", "plan", "stage.run_stage", "write_mapping"])
def test_text_of_an_unexpected_error_of_the_run_is_dropped(
    ward, tmp_path, monkeypatch, capfd, step
):
    monkeypatch.setattr(f"createproject.{step}", fail)
    said = ["-vv", "--debug", "--log-file", str(tmp_path / "log")]
    output = ["-o", str(tmp_path / "p.zip"), "-j", "1"]
    assert createproject.main([str(ward), *output, *said]) == 1
    text = spoken(capfd, tmp_path)
    assert "error: unexpected Surprise" in text
    assert f"in {fail.__name__}" in text
    assert planted(text) == []
    assert not (tmp_path / "p.zip").exists()


def test_unreadable_folder_of_a_patient_is_not_named(tmp_path):
    """As no mortal can: the superuser reads everything."""
    patient = tmp_path / "raw" / f"{MARK}11111"
    (patient / "study").mkdir(parents=True)
    patient.chmod(0)
    mortal = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("the superuser can't give up its rights here: setpriv is missing")
    script = [sys.executable, str(ROOT / "createproject.py"), "raw", "-o", "p.zip", "--debug"]
    prefix = mortal if os.geteuid() == 0 else []
    done = subprocess.run([*prefix, *script], cwd=tmp_path, capture_output=True, text=True)
    patient.chmod(0o700)
    assert "error: " in done.stderr
    assert "ermission" in done.stderr
    assert planted(done.stdout + done.stderr) == []


def test_foreign_zip_with_planted_headers_leaves_them_behind(hospital, garden, tmp_path, capfd):
    """Names of members and headers of their NIfTI are of no use to training."""
    patient = garden.text("sound nifti", "patient folder")
    sources = {p.name.rsplit("_", 1)[1]: p for p in hospital.glob(f"{patient}*/*/*.nii.gz")}
    roles = {"ct": "ct.nii.gz", "petsuv": "pet.nii.gz", "mask": "mask.nii.gz"}
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.comment = f"{MARK}22222".encode()
        for role, name in roles.items():
            content = sources[name].read_bytes()
            assert MARK.encode() in content
            archive.writestr(f"project/abc/abc_{role}.nii.gz", content)
        archive.writestr(f"project/{MARK}33333.txt", MARK)
    more = ["--save-nifti", str(tmp_path / "nifti"), *GRID, "-j", "1", "-vv", "--debug"]
    assert preprocessing.main([str(tmp_path / "p.zip"), "-o", str(tmp_path / "3d.h5"), *more]) == 0
    assert leaks(tmp_path, but="p.zip") == []
    said = capfd.readouterr()
    assert planted(said.out + said.err) == []
