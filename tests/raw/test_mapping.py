"""The private mapping: what goes in comes out, for its owner's eyes alone."""

import csv
import errno
import io
import os
import stat
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StageError
from common.raw import mapping
from common.raw.mapping import COLUMNS, Row

ROW = Row("raw", "Doe^Jane", "2001-01-01", "0123456789", "written", "", input="a1", output="b2")
SKIPPED = Row(
    "raw", "Müller", "x", "fedcba9876", "skipped", "no mask", found="CT: PET corr. | a, b.dcm"
)

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
    assert table[0][:10] == [
        *("project", "patient", "study", "hash", "status", "reason"),
        *("ct", "pet", "mask", "regions"),
    ]
    names = ["raw", "Doe^Jane", "2001-01-01", "0123456789", "written", ""]
    assert table[1] == [*names, "", "", "", "", "", "a1", "b2", ""]
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


@pytest.mark.parametrize("content", [b"", (",".join(COLUMNS) + "\r\n").encode()])
def test_an_empty_mapping_has_no_rows(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    assert mapping.read(tmp_path / "m.csv") == []


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


# --- nothing is lost -------------------------------------------------------------------------

OLDER = "project,patient,study,hash,status,reason,found,input,output\r\n"


def rewritten(path):
    """What is in a mapping after a run of another project."""
    other = Row("B", "p", "s", "bbbbbbbbbb", "written", "")
    mapping.write(path, mapping.merged(mapping.read(path), [other], "B", ["bbbbbbbbbb"]))
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return [row for row in csv.DictReader(stream, restkey="more") if row["project"] != "B"]


def test_a_mapping_of_an_older_version_is_read_and_kept(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(OLDER + "A,Doe,1,0123456789,written,,CT x,a1,b2\r\n")
    (row,) = rewritten(path)
    del row["ct"], row["pet"], row["mask"], row["regions"]
    assert ",".join(row.values()) == "A,Doe,1,0123456789,written,,CT x,a1,b2,"


@pytest.mark.parametrize("length", [131_072, 131_073, 1_000_000])
def test_a_cell_longer_than_csv_allows_costs_no_row(tmp_path, length):
    """The table was taken for damaged, so for empty, and replaced."""
    path = tmp_path / "m.csv"
    path.write_text(f"{OLDER}A,Doe,1,0123456789,failed,,{'x' * length},,\r\nA,Roe,1,01,written\r\n")
    assert [(row["patient"], len(row["found"])) for row in rewritten(path)] == [
        ("Doe", length),
        ("Roe", 0),
    ]


def test_cells_are_bounded():
    assert mapping.shortened("x" * 32_000) == "x" * 32_000
    assert mapping.shortened("x" * 32_005) == "x" * 32_000 + " ... and 5 characters more"


@pytest.mark.parametrize(
    ("heading", "line", "expected"),
    [
        ("", ",checked by hand", {"more": ["checked by hand"]}),
        (",note", ",seen", {"note": "seen"}),
        (",reader,date", ",KL,", {"reader": "KL", "date": ""}),
        (",,", ",,", {}),
        (",note,", ",seen,and again", {"note": "seen", "more": ["and again"]}),
    ],
    ids=["a further cell", "a further column", "two columns", "padded", "both"],
)
def test_notes_of_readers_stay(tmp_path, heading, line, expected):
    path = tmp_path / "m.csv"
    path.write_text(f"{OLDER[:-2]}{heading}\r\nA,Doe,1,0123456789,written,,,a1,b2{line}\r\n")
    for _ in range(2):
        (row,) = rewritten(path)
        assert (row["patient"], row["hash"], row["output"]) == ("Doe", "0123456789", "b2")
        assert {k: v for k, v in row.items() if k not in COLUMNS} == expected


def test_notes_stay_with_a_row_that_is_written_anew(tmp_path):
    noted = replace(ROW, further={"note": "seen"}, notes=("and again",))
    new = replace(ROW, status="failed", reason="no CT")
    copied = replace(noted, notes=("copied",))
    assert mapping.merged([noted, copied], [new], "raw", [ROW.hash]) == [
        copied,
        replace(new, further=noted.further, notes=noted.notes),
    ]


def test_one_study_of_two_projects_has_two_rows(tmp_path):
    """Folders of the same names have the same hash; the other project's row was dropped."""
    other = replace(ROW, project="other")
    assert mapping.merged([ROW], [other], "other", [ROW.hash]) == [other, ROW]


def test_a_study_that_is_gone_keeps_its_way_back():
    """Its pseudonym may be in files that were passed on."""
    (row,) = mapping.merged([ROW], [], "raw", [ROW.hash])
    assert (row.key, row.patient, row.status) == (ROW.key, ROW.patient, "gone")
    assert mapping.merged([ROW], [], "raw", []) == [ROW]


def test_a_folder_that_could_not_be_listed_is_no_study_that_is_gone():
    folder = replace(SKIPPED, study="", status="failed", found="")
    assert mapping.merged([folder], [ROW], "raw", [folder.hash, ROW.hash]) == [ROW]
    for kept in (replace(folder, notes=("a note",)), replace(folder, output="b2")):
        assert len(mapping.merged([kept], [ROW], "raw", [kept.hash, ROW.hash])) == 2
    assert mapping.merged([folder], [ROW], "raw", [ROW.hash]) == [ROW, folder]


def test_a_row_cut_short_is_kept(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(OLDER + "A,Doe,1,0123456789,wri\r\nA,Ro")
    assert [(row["patient"], row["hash"], row["status"]) for row in rewritten(path)] == [
        ("Doe", "0123456789", "wri"),
        ("Ro", "", ""),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (OLDER + 'A,Doe,1,"0123456789,written\r\nA,Roe,1,01,written,,,,\r\n', "damaged"),
        (OLDER + 'A,"Doe"x,1,0123456789,written,,,,\r\n', "damaged"),
        (OLDER[:-2] + ",note,note\r\nA,Doe,1,01,written,,,,,x,y\r\n", "several of one"),
        (OLDER[:-2] + ",,note\r\nA,Doe,1,01,written,,,,,x,y\r\n", "without a heading"),
    ],
    ids=["open quote", "text after a quote", "one heading twice", "no heading"],
)
def test_what_cannot_be_understood_stops_the_run(tmp_path, content, says):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(StageError, match=rf"m\.csv: the mapping .*{says}"):
        mapping.read(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == content.encode()


def test_a_mapping_with_every_cell_in_quotes_is_read(tmp_path):
    """As LibreOffice saves it."""
    path = tmp_path / "m.csv"
    mapping.write(path, [ROW, SKIPPED])
    with open(path, newline="", encoding="utf-8") as stream:
        table = list(csv.reader(stream))
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(table)
    assert mapping.read(path) == [ROW, SKIPPED]


@pytest.mark.parametrize("name", ["=1+2", "@SUM(A1)", "-2+3+cmd|' /C calc'!A0", "\t=1", "'=1"])
def test_a_name_that_a_spreadsheet_would_run_is_written_as_text(tmp_path, name):
    row = replace(ROW, patient=name)
    mapping.write(tmp_path / "m.csv", [row])
    with open(tmp_path / "m.csv", newline="") as stream:
        assert next(csv.DictReader(stream))["patient"] == "'" + name
    assert mapping.read(tmp_path / "m.csv") == [row]


@pytest.mark.parametrize("name", ["-001", "+49 30", "'quoted'", "O'Brien", "a=b"])
def test_other_names_are_written_as_they_are(tmp_path, name):
    mapping.write(tmp_path / "m.csv", [replace(ROW, patient=name)])
    with open(tmp_path / "m.csv", newline="") as stream:
        assert next(csv.DictReader(stream))["patient"] == name


def random_edit(lines, random):
    """Edit one line of a mapping; return the text, and the lines that were left alone."""
    at = random.randrange(len(lines))
    line = lines[at]
    place = random.randrange(len(line) + 1)
    sign = random.choice(['"', ",", "'", "x", "=", "\x00", "\r", "\n", ";", "\t", "\udcff", '""'])
    edited = random.choice(
        [
            line[:place],
            line[:place] + line[place + 1 :],
            line[:place] + sign + line[place:],
            line[:place] + sign + line[place + 1 :],
            line + sign + "note",
            f"{line}\r\n{line}",
        ]
    )
    rest = lines[:at] + lines[at + 1 :]
    return "\r\n".join([*lines[:at], edited, *lines[at + 1 :]]) + "\r\n", rest


def test_no_untouched_row_is_lost_by_a_thousand_random_edits(tmp_path):
    """Each is kept with all of its cells, or the run stops and leaves the file as it is."""
    random = Random(15)
    rows = [
        Row("A", f'Doe, {n} "x"' if n % 3 else f"Doe {n}", "1", f"{n:010d}", "written", "")
        for n in range(8)
    ]
    noted = [replace(row, further={"note": f"seen {row.hash}"}) for row in rows]
    path = tmp_path / "m.csv"
    mapping.write(path, noted)
    lines = path.read_bytes().decode().removesuffix("\r\n").split("\r\n")
    stopped = 0
    for _ in range(1000):
        text, untouched = random_edit(lines, random)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            found = rewritten(path)
        except StageError:
            stopped += 1
            assert path.read_bytes() == text.encode("utf-8", "surrogateescape")
            continue
        names = {(row["patient"], row["hash"], row["status"]) for row in found}
        cells = {
            cell
            for row in found
            for cell in [*row.get("more", []), *(v for k, v in row.items() if k != "more")]
        }
        _, *edited = csv.reader(io.StringIO(text, newline=""))
        assert all({cell, f"'{cell}"} & cells for line in edited for cell in line), text
        for row in noted:
            if any(row.hash in line for line in untouched):
                assert (row.patient, row.hash, "written") in names
                assert f"seen {row.hash}" in cells
    assert 50 < stopped < 500


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
