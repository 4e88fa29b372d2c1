"""The private mapping: what goes in comes out, for its owner's eyes alone."""

import csv
import errno
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StageError
from common.raw import mapping
from common.raw.mapping import COLUMNS, Row

ROW = Row("raw", "Doe^Jane", "2001-01-01", "0123456789", "written", "", "", "a1", "b2")
SKIPPED = Row("raw", "Müller", "x", "fedcba9876", "skipped", "no mask", "CT: PET corr. | a, b.dcm")

# Names of folders: anything but the two characters that paths reserve, bytes of no encoding too.
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1
) | st.binary(min_size=1).map(lambda name: name.decode("utf-8", "surrogateescape"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@settings(deadline=None, derandomize=True)
@given(rows=st.lists(st.builds(Row, *[NAMES] * 3, *[st.text("0123456789abcdef")] * 2, NAMES)))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("mapping") / "m.csv"
    mapping.write(path, rows)
    assert mapping.read(path) == rows


def test_columns_are_those_promised_then_own(tmp_path):
    mapping.write(tmp_path / "m.csv", [ROW, SKIPPED])
    with open(tmp_path / "m.csv", encoding="utf-8", newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0][:6] == ["project", "patient", "study", "hash", "status", "reason"]
    assert table[1] == [
        "raw",
        "Doe^Jane",
        "2001-01-01",
        "0123456789",
        "written",
        "",
        "",
        "a1",
        "b2",
    ]
    assert table[2][1:6] == ["Müller", "x", "fedcba9876", "skipped", "no mask"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private_from_its_first_byte(tmp_path, monkeypatch, umask):
    modes = []
    wrap = os.fdopen

    def noting_mode(descriptor, *args, **options):
        status = os.fstat(descriptor)
        modes.append((stat.S_IMODE(status.st_mode), status.st_size))
        return wrap(descriptor, *args, **options)

    monkeypatch.setattr(os, "fdopen", noting_mode)
    before = os.umask(umask)
    try:
        mapping.write(tmp_path / "m.csv", [ROW])
    finally:
        os.umask(before)
    assert modes == [(0o600, 0)]
    assert mode(tmp_path / "m.csv") == 0o600


def test_a_mapping_opened_to_others_is_closed_again(tmp_path):
    path = tmp_path / "m.csv"
    mapping.write(path, [ROW])
    path.chmod(0o644)
    mapping.write(path, [ROW])
    assert mode(path) == 0o600
    path.chmod(0o644)
    mapping.write(path, [SKIPPED])
    assert mode(path) == 0o600


def test_nothing_changed_nothing_written(tmp_path):
    path = tmp_path / "m.csv"
    mapping.write(path, [ROW])
    before = path.stat()
    mapping.write(path, [ROW])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".m.csv.tmp").write_text("half a mapping")
    mapping.write(tmp_path / "m.csv", [ROW])
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"project,patient,study,hash,status,reason,older,columns\r\n1,2,3,4,5,6,7,8\r\n",
        (",".join(COLUMNS) + '\r\na,b\r\n"unclosed').encode(),
    ],
    ids=["empty", "of another version", "damaged"],
)
def test_rows_that_are_of_no_use_are_none(tmp_path, content):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    assert mapping.read(path) == []


def test_an_absent_mapping_has_no_rows(tmp_path):
    assert mapping.read(tmp_path / "m.csv") == []


@pytest.mark.parametrize(
    "content",
    ["name;age\nDoe;61\n", "project;patient;study;hash\n", "\ufeffproject,patient,study,hash\n"],
    ids=["someone's table", "saved with semicolons", "saved with a byte-order mark"],
)
def test_another_file_is_never_replaced(tmp_path, content):
    path = tmp_path / "m.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StageError, match=r"is no mapping .* move it away"):
        mapping.read(path)


@pytest.mark.parametrize("function", [mapping.read, lambda path: mapping.write(path, [ROW])])
def test_a_folder_in_its_place_is_named(tmp_path, function):
    (tmp_path / "m.csv").mkdir()
    with pytest.raises(StageError, match=r"m\.csv: the mapping cannot be"):
        function(tmp_path / "m.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_new_private_file_never_replaces_one(tmp_path):
    (tmp_path / "key").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        mapping.create_private(tmp_path / "key", b"new")
    assert (tmp_path / "key").read_bytes() == b"old"


def test_a_linked_mapping_stays_on_the_safer_disk(tmp_path):
    """The link was replaced by a file, beside the data that it tells of."""
    (tmp_path / "safe").mkdir()
    link = tmp_path / "m.csv"
    link.symlink_to(tmp_path / "safe" / "m.csv")
    for row in (ROW, SKIPPED):
        mapping.write(link, [row])
        assert link.is_symlink()
        assert mapping.read(link) == [row]
    assert [path.name for path in (tmp_path / "safe").iterdir()] == ["m.csv"]
    assert mode(tmp_path / "safe" / "m.csv") == 0o600


def test_a_private_file_that_cannot_be_written_is_not_left_empty(tmp_path, monkeypatch):
    """An empty key file kept the next attempt from making one."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        mapping.create_private(tmp_path / "key", b"new")
    assert list(tmp_path.iterdir()) == []
