"""NIfTI in and out, held against nibabel; damage of every kind is refused by name."""

import gzip
import io
import re
import struct
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.geometry import Image
from common.nifti import encode_nifti, is_nifti_name, read_nifti, read_nifti_file, write_nifti_file

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2.5, 0, -110], [0, 0, 3.0, -200], [0, 0, 0, 1]])
DATATYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
SECRET = b"Weber^Klaus 19470811"


def encoded(image):
    return b"".join(encode_nifti(image))


def stored(data, affine=AFFINE, kind=nibabel.Nifti1Image, order="<", extension=None, **fields):
    """Bytes of an uncompressed NIfTI file, header fields replaced as they are, unchecked."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(data.dtype.newbyteorder("="))
    image = kind(data, affine, header)
    if extension is not None:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", extension))
    raw = image.to_bytes()
    size = image.header.template_dtype.itemsize
    header = kind.header_class(raw[:size], endianness=order, check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + raw[size:]


def read(raw, role="PET"):
    return read_nifti(io.BufferedReader(io.BytesIO(raw)), len(raw), role)


def refused(raw, pattern):
    with pytest.raises(StudyError, match=pattern) as caught:
        read(raw, "mask")
    assert re.fullmatch(r"(the|cannot read the) mask.*: .+", str(caught.value)), "no role or remedy"


def ramp(dtype="i2", shape=(4, 3, 5)):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def rotation(seed=0):
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_number_type_version_and_byte_order_is_read(dtype, order, kind):
    raw = stored(ramp(dtype), kind=kind, order=order)
    for file in (raw, gzip.compress(raw)):
        image = read(file)
        assert np.array_equal(image.data, ramp(dtype))
        assert image.data.dtype == (np.float32 if dtype[0] == "f" else np.dtype(dtype))
        assert image.data.dtype.isnative
        assert np.array_equal(image.affine, AFFINE)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize(("slope", "intercept"), [(0.25, -3.0), (-2.0, 0.0), (1.0, 7.0)])
def test_scaling_is_nibabels(dtype, order, slope, intercept):
    raw = stored(ramp(dtype), order=order, scl_slope=slope, scl_inter=intercept)
    image = read(raw)
    assert image.data.dtype == np.float32
    expected = nibabel.Nifti1Image.from_bytes(raw).get_fdata()
    np.testing.assert_allclose(image.data, expected, rtol=1e-7)


def test_scaling_is_rounded_once():
    """A slope in float32 of a large int32 with an offset would lose the digits that count."""
    data = np.array([[[2_000_000_001, 2_000_000_011]]], "i4")
    image = read(stored(data, scl_slope=1.0, scl_inter=-2_000_000_000))
    assert image.data.ravel().tolist() == [1, 11]


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_slope_of_zero_or_nan_means_no_scaling(slope):
    image = read(stored(ramp(), scl_slope=slope, scl_inter=5))
    assert image.data.dtype == np.int16
    assert np.array_equal(image.data, ramp())


@pytest.mark.parametrize("shape", [(4, 3, 5, 1), (4, 3, 5, 1, 1), (4, 3), (4,)])
def test_one_volume_of_any_number_of_axes_is_read_as_three(shape):
    image = read(stored(ramp(shape=shape)))
    assert image.data.shape == (*shape, 1, 1)[:3]
    assert np.array_equal(image.data.ravel(), ramp(shape=shape).ravel())


def test_extensions_are_skipped():
    assert np.array_equal(read(stored(ramp(), extension=SECRET * 50)).data, ramp())


def test_gzip_of_several_members_and_zero_padding_is_read():
    raw = stored(ramp())
    file = gzip.compress(raw[:100]) + gzip.compress(raw[100:400]) + gzip.compress(raw[400:])
    assert np.array_equal(read(file + bytes(512)).data, ramp())


def test_name_in_a_gzip_header_is_skipped():
    raw = stored(ramp())
    named = io.BytesIO()
    with gzip.GzipFile("Weber_Klaus.nii", "wb", fileobj=named) as stream:
        stream.write(raw)
    assert b"Weber_Klaus" in named.getvalue()
    assert np.array_equal(read(named.getvalue()).data, ramp())


@pytest.mark.parametrize("name", ["ct.nii", "CT.NII.GZ", "a.b.nii.gz"])
def test_names_of_nifti_files(name):
    assert is_nifti_name(name)
    assert not is_nifti_name(name + ".bak")
    assert not is_nifti_name(name.lower().replace("nii", "img"))


# --- where it lies ---------------------------------------------------------------------------


def sform_only(affine, **fields):
    return {"qform_code": 0, "sform_code": 1, **rows(affine), **fields}


def rows(affine):
    return dict(zip(("srow_x", "srow_y", "srow_z"), affine[:3], strict=True))


def test_sform_alone():
    moved = AFFINE + np.eye(4, k=3) * 5
    assert np.array_equal(read(stored(ramp(), **sform_only(moved))).affine, moved)


def test_qform_alone():
    image = read(stored(ramp(), qform_code=1, sform_code=0, **rows(np.zeros((3, 4)))))
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


def test_sform_goes_before_qform():
    nearly = AFFINE + np.eye(4, k=3) * 0.875
    assert np.array_equal(read(stored(ramp(), sform_code=2, **rows(nearly))).affine, nearly)


@pytest.mark.parametrize("qfac", [0.0, np.nan])
def test_missing_qfac_reads_as_one(qfac):
    """Files with pixdim[0] = 0, which many writers leave so, were refused."""
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    raw = stored(ramp(), affine, pixdim=[qfac, 2, 2.5, 3, 1, 1, 1, 1], qform_code=1, sform_code=0)
    np.testing.assert_allclose(read(raw).affine, affine, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.sampled_from((-1.0, 1.0)), st.booleans())
def test_affine_of_a_qform_is_nibabels_to_the_bit(seed, qfac, half_turn):
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=4)
    # The real part of half a turn is 0, and rounding may take its square below.
    quaternion[0] *= not half_turn
    b, c, d = (quaternion / np.linalg.norm(quaternion))[1:]
    spacing = [*rng.choice([0.9765625, 1.17, 2.03642, 3.27], 3), 1, 1, 1, 1]
    fields = {f"quatern_{name}": part for name, part in zip("bcd", (b, c, d), strict=True)}
    fields |= {f"qoffset_{axis}": rng.uniform(-500, 500) for axis in "xyz"}
    raw = stored(ramp(), qform_code=1, sform_code=0, pixdim=[qfac, *spacing], **fields)
    expected = nibabel.Nifti1Image.from_bytes(raw).affine
    np.testing.assert_array_equal(read(raw).affine, expected)


@pytest.mark.parametrize("units", [0, 2, 10, 8])
def test_unstated_units_and_millimetres_are_taken(units):
    assert np.array_equal(read(stored(ramp(), xyzt_units=units)).affine, AFFINE)


@pytest.mark.parametrize("units", [1, 3, 9])
def test_metres_and_micrometres_are_refused(units):
    refused(stored(ramp(), xyzt_units=units), "xyzt_units.*: convert it to mm")


def test_disagreement_of_sform_and_qform_beyond_a_millimetre_is_refused():
    far = AFFINE + np.eye(4, k=3) * 1.1
    refused(stored(ramp(), sform_code=2, qform_code=1, **rows(far)), r"1\.1 mm apart: convert")
    wide = AFFINE @ np.diag([1.1, 1, 1, 1])  # the first voxel agrees, the last does not
    refused(stored(ramp(shape=(20, 3, 5)), sform_code=2, qform_code=1, **rows(wide)), "3.8 mm")


@pytest.mark.parametrize(
    ("pixdim", "fits"),
    [
        ((2.5, 2.5, 3), True),
        ((2.51, 2.5, 2.98), True),  # rounded
        ((0, 0, 0), True),  # says nothing
        ((2.5, 2.5, 3.1), False),
        ((2.46, 2.5, 3), False),
        ((1, 1, 1), False),
    ],
)
def test_voxel_sizes_that_contradict_the_sform_by_a_hundredth_are_refused(pixdim, fits):
    affine = np.diag([2.5, 2.5, 3, 1])
    raw = stored(ramp(), pixdim=[1, *pixdim, 1, 1, 1, 1], **sform_only(affine))
    if fits:
        assert np.array_equal(read(raw).affine, affine)
    else:
        refused(raw, r"voxel sizes contradict .*pixdim .* mm, sform 2\.5 x 2\.5 x 3 mm")


def test_voxel_sizes_of_a_tilted_gantry_are_steps_or_distances_of_planes():
    affine = np.array([[2.0, 0, 0, 0], [0, 2, 0.75, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    for between_planes in (3, np.hypot(3, 0.75)):
        raw = stored(ramp(), pixdim=[1, 2, 2, between_planes, 1, 1, 1, 1], **sform_only(affine))
        assert np.array_equal(read(raw).affine, affine)


def test_file_without_orientation_is_refused():
    refused(stored(ramp(), qform_code=0, sform_code=0), "qform_code and sform_code are 0")


@pytest.mark.parametrize(
    ("affine", "what"),
    [
        (np.zeros((4, 4)), "zero or degenerate"),
        (np.diag([2.0, 2.5, 0, 1]), "zero or degenerate"),
        (AFFINE @ np.array([[1, 1, 0, 0], [0, 0.01, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "degener"),
        (np.diag([2.0, np.nan, 3, 1]), "non-finite"),
        (np.diag([2.0, 2, 3, 1]) + np.where(np.eye(4, k=3), np.inf, 0), "non-finite"),
        (np.diag([2.0, 2, 1e30, 1]), "cannot be: convert it again"),
        (np.diag([2.0, 2, 1001, 1]), "cannot be"),
        (np.diag([2.0, 2, 1e-3, 1]), "cannot be"),
    ],
)
def test_impossible_affines_are_refused(affine, what):
    refused(stored(ramp(), **sform_only(affine)), what)


@pytest.mark.parametrize(
    "fields",
    [
        {"quatern_b": np.nan},
        {"quatern_b": np.inf},
        {"quatern_b": 2.0},
        {"qoffset_x": np.nan},
        {"pixdim": [1, -2, 2.5, 3, 1, 1, 1, 1]},
        {"pixdim": [1, 2, np.nan, 3, 1, 1, 1, 1]},
    ],
)
@pytest.mark.parametrize("sform_code", [0, 1])
def test_damaged_qforms_are_refused(fields, sform_code):
    raw = stored(ramp(), qform_code=1, sform_code=sform_code, **fields)
    refused(raw, "damaged orientation|non-finite affine")


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"magic": b"ni1"}, "half of a pair of .hdr and .img"),
        ({"magic": b"n+2"}, "wrong magic"),
        ({"magic": b""}, "wrong magic"),
        ({"sizeof_hdr": 347}, "no NIfTI header"),
        ({"dim": [0, 4, 3, 5, 1, 1, 1, 1]}, "dim"),
        ({"dim": [8, 4, 3, 5, 1, 1, 1, 1]}, "dim"),
        ({"dim": [-1, 4, 3, 5, 1, 1, 1, 1]}, "dim"),
        ({"dim": [3, 4, 0, 5, 1, 1, 1, 1]}, "dim"),
        ({"dim": [3, 4, -3, 5, 1, 1, 1, 1]}, "dim"),
        ({"dim": [4, 4, 3, 5, 0, 1, 1, 1]}, "dim"),
        ({"dim": [4, 2, 3, 5, 2, 1, 1, 1]}, "2 volumes"),
        ({"dim": [7, 1, 1, 1] + [32767] * 4}, f"{32767**4} volumes"),
        ({"dim": [3, 32767, 32767, 3, 1, 1, 1, 1]}, "implausible size"),
        ({"datatype": 1}, "datatype"),
        ({"datatype": 12345}, "datatype"),
        ({"datatype": 128}, "no plain numbers"),
        ({"datatype": 32}, "no plain numbers"),
        ({"datatype": 1536}, "no plain numbers"),
        ({"scl_slope": np.inf}, "scl_slope"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "scl_inter"),
        ({"vox_offset": 0}, "vox_offset"),
        ({"vox_offset": -352}, "vox_offset"),
        ({"vox_offset": np.nan}, "vox_offset"),
        ({"vox_offset": np.inf}, "vox_offset"),
        ({"vox_offset": 352.5}, "vox_offset"),
        ({"vox_offset": 1e9}, "vox_offset"),
    ],
)
def test_damaged_headers_are_refused(fields, what):
    refused(stored(ramp(), **fields), what)


def test_axis_longer_than_nifti_1_can_write_is_refused():
    refused(stored(ramp("u1", (40000, 1, 1)), kind=nibabel.Nifti2Image), "implausible size")


@pytest.mark.parametrize("raw", [b"", b"\x5c\x01", b"plain text, not an image", bytes(400)])
def test_other_files_are_refused(raw):
    refused(raw, "not NIfTI|truncated")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_values_that_are_not_finite_are_refused(value, dtype):
    data = ramp(dtype)
    data[-1, -1, -1] = value
    refused(stored(data), "NaN or inf")
    refused(stored(data, scl_slope=2), "NaN or inf")


@pytest.mark.filterwarnings("error")
def test_values_beyond_float32_are_refused_without_a_warning():
    refused(stored(ramp("f8") * 1e39), "NaN or inf")
    refused(stored(ramp(), scl_slope=3e38), "NaN or inf")


@pytest.mark.parametrize("kept", [3, 100, 347, 350, 352, 400, -1])
def test_truncated_files_are_refused(kept):
    raw = stored(ramp())
    refused(raw[:kept], "truncated")
    refused(gzip.compress(raw[:kept]), "truncated")


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9, 0.99])
def test_truncated_gzip_is_refused(fraction):
    file = gzip.compress(stored(ramp()))
    refused(file[: int(fraction * len(file))], "truncated")


def test_data_behind_the_voxels_are_refused():
    refused(stored(ramp()) + b"\0", "more data")
    refused(gzip.compress(stored(ramp()) + b"\0"), "more data")
    refused(gzip.compress(stored(ramp())) + gzip.compress(b"\0"), "more data")


def test_data_behind_the_voxels_that_end_as_the_volume_does_are_refused():
    file = gzip.compress(stored(ramp()))
    refused(file + file, "more data")
    for n_between in (0, 1, 1 << 18):
        refused(file + bytes(n_between) + file[-8:], "damaged")


def test_every_flipped_bit_of_a_gzipped_volume_is_noticed_or_harmless():
    file = gzip.compress(stored(ramp("u1", (2, 2, 2))), mtime=0)
    for bit in range(8 * len(file)):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            image = read(bytes(damaged))
        except StudyError:
            continue
        assert np.array_equal(image.data, ramp("u1", (2, 2, 2)))
        assert np.array_equal(image.affine, AFFINE)


@pytest.mark.parametrize("at", [-8, -4])
def test_wrong_checksum_or_length_at_the_end_of_gzip_is_refused(at):
    file = bytearray(gzip.compress(stored(ramp())))
    file[at] ^= 1
    refused(bytes(file), "checksum")


def test_header_that_promises_more_than_the_file_can_hold_allocates_nothing():
    one_mm = {"pixdim": np.ones(8), **sform_only(np.eye(4))}
    raw = stored(ramp("u1"), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1], **one_mm)
    tracemalloc.start()
    refused(raw, "promises 1000000000 bytes")
    refused(gzip.compress(raw), "promises 1000000000 bytes")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_bomb_is_read_no_further_than_its_header_promises():
    """64 MB of zeros behind a small volume: the first byte too many ends the reading."""
    squeezer = zlib.compressobj(1, zlib.DEFLATED, 31)
    bomb = [squeezer.compress(stored(ramp("u1")))]
    bomb += [squeezer.compress(bytes(1 << 20)) for _ in range(64)]
    bomb.append(squeezer.flush())
    tracemalloc.start()
    refused(b"".join(bomb), "more data")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("fields", [{}, {"scl_slope": 0.5}])
@pytest.mark.parametrize("order", ["<", ">"])
def test_volume_is_in_memory_once(fields, order):
    raw = stored(np.zeros((200, 200, 100), "i2"), order=order, **fields)
    file = gzip.compress(raw, 1)
    del raw
    tracemalloc.start()
    image = read(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < image.data.nbytes + 16e6


def test_missing_file_is_refused_without_its_path(tmp_path):
    with pytest.raises(StudyError, match=r"cannot read the CT \(No such file") as caught:
        read_nifti_file(tmp_path / "Weber_Klaus.nii", "CT")
    assert "Weber" not in str(caught.value)


# --- what is written -------------------------------------------------------------------------

BLANK = {
    "data_type": b"", "db_name": b"", "extents": 0, "session_error": 0, "regular": b"",
    "dim_info": 0, "intent_p1": 0, "intent_p2": 0, "intent_p3": 0, "intent_code": 0,
    "slice_start": 0, "slice_end": 0, "slice_code": 0, "slice_duration": 0, "cal_max": 0,
    "cal_min": 0, "toffset": 0, "glmax": 0, "glmin": 0, "descrip": b"", "aux_file": b"",
    "intent_name": b"",
}  # fmt: skip

sides = st.integers(1, 6)
spacings = st.floats(0.1, 20)
shears = st.floats(-0.5, 0.5)


@st.composite
def images(draw, sheared=False):
    dtype = np.dtype(draw(st.sampled_from(["u1", "u2", "i2", "f4"])))
    shape = (draw(sides), draw(sides), draw(sides))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = random.normal(scale=100, size=shape).astype(dtype)
    if draw(st.booleans()):
        data = np.asfortranarray(data)
    matrix = rotation(draw(st.integers(0, 1000))) if draw(st.booleans()) else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = matrix * [draw(spacings), draw(spacings), draw(spacings)]
    if sheared:
        affine[:3, 2] += draw(shears) * affine[:3, 1]
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    return Image(data, affine)


def reread(image):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(encoded(image)))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(images())
def test_nibabel_reads_what_was_written(image):
    found = reread(image)
    assert np.array_equal(np.asanyarray(found.dataobj), image.data)
    assert found.get_data_dtype() == image.data.dtype
    assert found.header.get_slope_inter() in ((None, None), (1, 0))
    assert found.get_sform(coded=True)[1] == found.get_qform(coded=True)[1] == 1
    np.testing.assert_allclose(found.get_sform(), image.affine, atol=1e-4)
    # Quaternions in float32 tell an angle to 4e-4 at worst, near half a turn.
    np.testing.assert_allclose(found.get_qform(), image.affine, atol=4e-4 * 20)
    np.testing.assert_allclose(found.header.get_zooms(), image.grid.spacing_mm, rtol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(images())
def test_written_images_are_read_back(image):
    found = read(encoded(image))
    assert np.array_equal(found.data, image.data)
    assert found.data.dtype == image.data.dtype
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    assert np.array_equal(read(encoded(found)).affine, found.affine)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(images(sheared=True))
def test_sheared_affine_is_in_the_sform_alone(image):
    cosine = image.affine[:3, 1] @ image.affine[:3, 2] / np.prod(image.grid.spacing_mm[1:])
    assume(abs(cosine) * max(np.multiply(image.grid.spacing_mm, image.data.shape)) > 0.11)
    found = reread(image)
    assert found.get_sform(coded=True)[1] == 1
    assert found.get_qform(coded=True) == (None, 0)
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    assert not any(found.header[f"quatern_{axis}"] for axis in "bcd")
    assert not any(found.header[f"qoffset_{axis}"] for axis in "xyz")


def test_no_header_field_tells_anything():
    header = reread(Image(ramp(), AFFINE)).header
    for field, blank in BLANK.items():
        assert header[field] == blank, field
    assert header.get_xyzt_units() == ("mm", "unknown")
    geometry = {"sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "xyzt_units"}
    forms = {name for name in header if name[:5] in ("qform", "sform", "quate", "qoffs", "srow_")}
    assert set(header) == set(BLANK) | geometry | forms | {"magic", "scl_slope", "scl_inter"}
    assert not header.extensions


def test_nothing_of_the_source_header_is_written():
    raw = stored(
        ramp("f4"),
        extension=SECRET,
        descrip=SECRET,
        db_name=SECRET[:18],
        aux_file=SECRET,
        intent_name=SECRET[:16],
        data_type=SECRET[:10],
    )
    assert raw.count(SECRET[:10]) == 6
    assert SECRET[:5] not in gzip.decompress(encoded(read(raw)))


def test_gzip_header_has_no_name_and_no_time():
    magic, method, flags, time, _, _ = struct.unpack("<2sBBIBB", encoded(read(stored(ramp())))[:10])
    assert (magic, method, flags, time) == (b"\x1f\x8b", 8, 0, 0)


def test_written_file_is_one_gzip_member():
    """Some readers, those of browsers say, end with the first."""
    inflater = zlib.decompressobj(31)
    inflater.decompress(encoded(Image(ramp(), AFFINE)))
    assert inflater.eof
    assert not inflater.unused_data


def test_memory_order_does_not_change_a_byte():
    data = np.random.default_rng(0).integers(-1000, 1000, (150, 140, 130)).astype("i2")
    by_order = [np.ascontiguousarray(data), np.asfortranarray(data), data[::-1][::-1]]
    files = {encoded(Image(array, AFFINE)) for array in by_order}
    assert len(files) == 1
    assert np.array_equal(read(files.pop()).data, data)


def test_file_is_what_is_encoded(tmp_path):
    image = Image(ramp(), AFFINE)
    write_nifti_file(tmp_path / "ct.nii.gz", image)
    assert (tmp_path / "ct.nii.gz").read_bytes() == encoded(image)
    assert np.array_equal(read_nifti_file(tmp_path / "ct.nii.gz", "CT").data, image.data)
