"""What a raw study's images take in memory is told by headers, not by how well they compress."""

import numpy as np
import pytest
from dicom_builders import affine_of, build_slices, write_slices
from pydicom import uid

import createproject
from common.geometry import Image
from common.nifti import write_nifti_file
from common.raw.project import files_below, image_bytes

SHAPE = (40, 30, 12)
N_VOXELS = 40 * 30 * 12


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_gzipped_volume_counts_as_what_it_inflates_to(dtype, tmp_path):
    write_nifti_file(tmp_path / "ct.nii.gz", Image(np.zeros(SHAPE, dtype), np.eye(4)))
    assert (tmp_path / "ct.nii.gz").stat().st_size < 1000
    assert image_bytes(str(tmp_path), files_below(str(tmp_path))) == (
        N_VOXELS * np.dtype(dtype).itemsize
    )


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_compressed_slices_count_as_what_their_matrix_holds(syntax, tmp_path):
    slices = build_slices(np.zeros(SHAPE, np.int16), affine_of())
    write_slices(tmp_path, slices, syntax)
    found = image_bytes(str(tmp_path), files_below(str(tmp_path)))
    # The largest slice stands for all, and headers count, too.
    assert 0.95 < found / (2 * N_VOXELS) < 1.7


def test_what_cannot_be_read_counts_by_its_size(tmp_path):
    (tmp_path / "ct.nii.gz").write_bytes(b"\x1f\x8b" + bytes(998))
    (tmp_path / "notes.txt").write_bytes(bytes(500))
    (tmp_path / "empty.dcm").touch()
    assert image_bytes(str(tmp_path), files_below(str(tmp_path))) == 1500
    assert image_bytes(str(tmp_path), []) == 0


def test_the_log_says_what_the_largest_study_takes(tmp_path, capsys):
    study = tmp_path / "raw" / "patient" / "study"
    study.mkdir(parents=True)
    volume = Image(np.zeros((512, 512, 400), np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))
    write_nifti_file(study / "ct.nii.gz", volume)
    assert (study / "ct.nii.gz").stat().st_size < 2_000_000
    command = [str(tmp_path / "raw"), "-o", str(tmp_path / "p.zip"), "--dry-run", "-v"]
    assert createproject.main(command) == 0
    # 0.15 GB and three times 0.21 GB.
    assert "the largest study takes about 0.8 GB" in capsys.readouterr().err
