"""The quality-control page: what it says, what it shows, how it behaves in a real browser."""

import base64
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import project_zips
import pytest
from PIL import Image

import preprocessing
from common import geometry, plausibility, quality_warnings
from common.errors import Kind, Warning, warnings_from
from common.geometry import Grid
from common.report import page as page_module
from common.report import pictures, suv_words
from common.report.case_table import COLUMNS, case_rows
from common.suv.provenance import Rule

SHAPE = (24, 20, 30)
N_LESIONS = 3
"""Of the study in a zip."""
ATTRIBUTES = {
    "project": "liver <b>trial</b>",
    "affine": np.diag([-2.0, 2.0, 3.0, 1.0]),
    "suv_range": [0.0, 40.0],
    "ct_range": [-1000.0, 1000.0],
    "iso_threshold": 41.0,
}
BQML = {
    "suv_type": "bw",
    "suv_units": "g/ml",
    "units": "BQML",
    "decay_correction": "START",
    "rule": "12b",
    "minutes_to_reference": [62.0, 62.0],
    "factor_range": [4e-4, 4e-4],
    "weight_kg": 75.0,
    "reinterpretations": [],
    "alternatives": {"autopet": 4.1e-4, "qiba": 4e-4, "frame_based": 3.5e-4},
}


def a_card(key="0123456789", warnings=(), suv_max=8.0, tmtv_ml=12.0, mask=None, provenance=BQML):
    """A card of a study with one lesion at (18, 5, 25), left, behind and high up."""
    if mask is None:
        mask = np.zeros(SHAPE, np.uint8)
        mask[17:20, 4:7, 24:27] = 1
    image = np.zeros((2, *SHAPE), np.float16)
    image[0][mask > 0] = suv_max / 40
    image[1] = 0.5
    lesion = {
        "label": 1,
        "mtv_ml": tmtv_ml,
        "iso_mtv_ml": tmtv_ml,
        "suv_max": suv_max,
        "suv_mean": 5.0,
        "suv_peak": 6.0,
        "tlg_g": 60.0,
        "centroid_mm": (-36.0, 10.0, 75.0),
    }
    study = {"lesion_count": 1, "tmtv_ml": tmtv_ml, "dmax_mm": 0.0, "dose_fraction": 0.5}
    measures = {"lesions": [lesion] if mask.any() else [], "study": study}
    return page_module.study_card(
        key, image, mask[None], mask[None], ATTRIBUTES, measures, provenance, warnings
    )


def a_page(cards):
    stream = io.BytesIO()
    page_module.write_page(stream, "demo", "0f3a", [card.encode() for card in cards])
    return stream.getvalue().decode()


# --- sentences -------------------------------------------------------------------------------


def test_the_sentence_says_units_decay_time_factor_and_weight():
    assert suv_words.suv_sentence(BQML) == (
        "SUV (bw, g/ml), from Units BQML, DecayCorrection START, decay referred to the start of "
        "the series, 62 min after injection, factor 0.0004, body weight 75 kg (rule 12b)."
    )


def test_the_sentence_tells_reinterpretations():
    sentence = suv_words.suv_sentence({**BQML, "reinterpretations": ["weight taken as grams"]})
    assert sentence.endswith("Reinterpreted: weight taken as grams.")


def test_page_and_table_of_cases_tell_one_uptake_and_none_where_values_refer_to_injection():
    """The page took the mean of the slices, the table the least, each with its own ADMIN."""
    beds = {**BQML, "rule": "13", "minutes_to_reference": [62.0, 92.0]}
    injection = {**BQML, "rule": "9+11", "minutes_to_reference": [0.0, 0.0]}
    for provenance, told in ((beds, "62"), (injection, "")):
        assert f'data-minutes="{told}"' in a_card(provenance=provenance)
        [cells] = case_rows([("a", "a", {"suv": json.dumps(provenance)})])
        assert cells[COLUMNS.index("uptake_minutes")] == told
    assert "62 to 92 min after injection" in suv_words.suv_sentence(beds)
    assert "min after" not in suv_words.suv_sentence(injection)


def test_without_provenance_the_sentence_says_so():
    assert "not known" in suv_words.suv_sentence({})


def test_alternatives_are_told_as_differences_in_percent():
    assert suv_words.alternatives_sentence(BQML) == (
        "Other rules would give: first file's AcquisitionTime (autoPET script) +2.5 %, "
        "QIBA +0.0 %, frame times -12.5 %"
    )


def test_values_that_are_suv_already_have_no_alternatives():
    assert suv_words.alternatives_sentence({**BQML, "units": "GML"}) == ""


def test_each_rule_is_told_in_one_sentence_that_leads_to_the_docs():
    assert set(suv_words.WORDS_OF_RULE) == set(Rule)
    for rule, sentence in suv_words.WORDS_OF_RULE.items():
        assert sentence.count(".") == 1
        assert rule in sentence or rule == Rule.GIVEN
    both = suv_words.rule_sentences({"rule": "9+12a"})
    assert [word[:-1] for word in both.split() if word.endswith(":")] == ["9", "12a"]
    assert suv_words.rule_sentences({}) == ""
    card = a_card()
    assert "Rule 12b: decay was corrected to the start of the series" in card
    docs = Path(__file__).parents[2] / "docs"
    links = set(re.findall(r'href="docs/(\S+?)#(\S+?)"', a_page([card])))
    assert len(links) == 3
    for page, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (docs / page).read_text(), flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs


# --- markup ----------------------------------------------------------------------------------


def test_text_from_files_is_escaped():
    card = a_card(warnings=[Warning(Kind.OTHER, "<script>alert(1)</script>")])
    assert "<b>trial" not in card
    assert "<script>" not in card


def test_a_study_without_lesion_has_no_slice_through_one():
    card = a_card(mask=np.zeros(SHAPE, np.uint8))
    assert card.count("<img") == 2
    assert "No lesion." in card
    assert "<table>" not in card


def test_a_thousand_noisy_studies_stay_below_150_mb():
    random = np.random.default_rng(0)
    image = random.gamma(20, 1 / 400, (2, 200, 200, 326)).astype(np.float16)
    mask = np.zeros((1, 200, 200, 326), np.uint8)
    lesion = dict.fromkeys(("iso_mtv_ml", "suv_max", "suv_mean", "suv_peak", "tlg_g"), 1.0)
    lesions = []
    for number, z in enumerate((60, 160, 260, 320), start=1):
        mask[0, 90:110, 90:110, z : z + 4] = 1
        place = {"label": number, "mtv_ml": 9.0 - number, "centroid_mm": (-198.0, 198.0, 3.0 * z)}
        lesions.append({**lesion, **place})
    attributes = {**ATTRIBUTES, "affine": np.diag([-2.0, 2.0, 3.0, 1.0])}
    study = {"lesion_count": 4, "tmtv_ml": 0.0, "dmax_mm": 0.0, "dose_fraction": None}
    measures = {"lesions": lesions, "study": study}
    card = page_module.study_card("aaaaaaa001", image, mask, mask, attributes, measures, {}, [])
    assert len(card) < 150_000
    assert card.count("<img") == 2 + page_module.FEW_LESIONS
    assert "Slices are shown of the 3 largest of 4 lesions." in card


def test_the_page_fetches_nothing():
    page = a_page([a_card()])
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("view", "shape", "column", "row"),
    [
        (0, (45, 24), 18, (29 - 25) * 1.5),  # coronal: left on the right, head up
        (1, (45, 20), 19 - 5, (29 - 25) * 1.5),  # sagittal: back on the right
    ],
)
def test_the_lesion_is_outlined_where_a_radiologist_expects_it(view, shape, column, row):
    height, width = (pictures.PICTURE_SCALE * n for n in shape)
    pixels = picture(a_card(), view)
    # The bar of colours has a margin of its own.
    pixels = pixels[:height, :width]
    rows, columns = np.nonzero(np.ptp(pixels, axis=2) > 60)
    assert rows.mean() / pictures.PICTURE_SCALE == pytest.approx(row, abs=2)
    assert columns.mean() / pictures.PICTURE_SCALE == pytest.approx(column, abs=1)


def picture(card, view):
    source = card.split('src="data:image/webp;base64,')[view + 1].split('"')[0]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB"), int)


@pytest.mark.parametrize("view", [0, 1, 2])
def test_both_outlines_are_seen_where_mask_and_isocontour_are_the_same(view):
    red, green, blue = np.moveaxis(picture(a_card(), view), 2, 0)
    assert np.count_nonzero((green > red + 60) & (green > blue + 60)) > 20
    assert np.count_nonzero((red > green + 60) & (blue > green + 30)) > 20


def test_every_picture_says_which_side_is_which():
    alternatives = re.findall(r'alt="(.*?)"', a_card())
    assert len(alternatives) == 3
    assert all("left" in text for text in alternatives)


def hottest(volumes):
    lesion = {"label": 1, "mtv_ml": 0.3, "centroid_mm": (-36.0, 10.0, 75.0)}
    return pictures.hottest_voxels(volumes, [lesion], by_label=False)[1]


def test_a_lesion_is_cut_through_its_hottest_voxel_and_the_place_is_told_in_mm():
    mask = np.zeros(SHAPE, np.uint8)
    mask[17:20, 4:7, 24:27] = 1
    image = np.zeros((2, *SHAPE), np.float16)
    image[0][mask > 0] = 0.1
    image[0][19, 4, 26] = 0.3
    volumes = pictures.volumes_of(image, mask, mask, ATTRIBUTES)
    assert hottest(volumes) == (19, 4, 26)
    found = pictures.lesion_picture(volumes, 7, (19, 4, 26))
    assert found["caption"] == "Lesion 7: axial, z = 78 mm; coronal, y = 8 mm; sagittal, x = -38 mm"


def two_places(labels):
    """Volumes with a label at (18, 5, 25) and one at (4, 5, 5), hottest at their first voxels."""
    mask, image = np.zeros(SHAPE, np.uint8), np.zeros((2, *SHAPE), np.float16)
    for label, (i, j, k) in zip(labels, ((17, 4, 24), (3, 4, 4)), strict=True):
        block = slice(i, i + 3), slice(j, j + 3), slice(k, k + 3)
        mask[block], image[0][block], image[0][i, j, k] = label, 0.1, 0.2
    return pictures.volumes_of(image, mask, mask, ATTRIBUTES)


NEAR, FAR = (-36.0, 10.0, 75.0), (-8.0, 10.0, 15.0)


def row(label, place_mm):
    return {"label": label, "mtv_ml": 0.3, "centroid_mm": place_mm}


def test_a_lesion_that_vanished_by_resampling_is_not_shown_as_another_one():
    rows = [row(1, NEAR), row(2, FAR), row(3, (-36.0, 10.0, 5.0))]
    found = pictures.hottest_voxels(two_places((1, 1)), rows, by_label=False)
    assert found == {1: (17, 4, 24), 2: (3, 4, 4)}


def test_with_labels_kept_a_row_is_shown_where_its_label_is_hottest():
    middle = (-22.0, 10.0, 45.0)
    found = pictures.hottest_voxels(
        two_places((2, 7)), [row(2, NEAR), row(7, FAR), row(9, NEAR)], by_label=True
    )
    assert found == {2: (17, 4, 24), 7: (3, 4, 4)}
    [voxel] = pictures.hottest_voxels(two_places((1, 1)), [row(1, middle)], by_label=True).values()
    assert voxel in ((17, 4, 24), (3, 4, 4))


@pytest.mark.parametrize(
    "value",
    ["", "[]", "{", "{" * 5000, '{"study": {}}', 5, None, '{"study": {"lesion_count": "x"}}'],
)
def test_measures_and_provenance_of_another_make_are_left_out(value):
    assert page_module.sound_measures(value) == {}
    assert suv_words.sound_provenance(value) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"rule": 7},
        {"suv_type": None},
        {"factor_range": "large"},
        {"weight_kg": "heavy"},
        {"minutes_to_reference": ["a"]},
        {"reinterpretations": 5},
        {"alternatives": ["a"]},
        {"alternatives": {"autopet": "a"}},
    ],
)
def test_provenance_of_odd_types_is_told_as_unknown(change):
    record = suv_words.sound_provenance(json.dumps({**BQML, **change}))
    assert record == {}
    assert "not known" in suv_words.suv_sentence(record)


def test_a_lesion_lies_in_the_middle_of_each_panel_whatever_the_orientation_of_the_file():
    side, heading, gap = pictures.PANEL_PIXELS, 18, 4
    for flip in ((1, 1, 1), (-1, 1, 1), (1, -1, -1)):
        mask = np.zeros(SHAPE, np.uint8)
        mask[17:20, 4:7, 24:27] = 1
        image = np.zeros((2, *SHAPE), np.float16)
        image[0][mask > 0] = 0.2
        affine = np.diag([-2.0, 2.0, 3.0, 1.0])
        turn = tuple(slice(None, None, step) for step in flip)
        turned = affine.copy()
        for axis, (step, n) in enumerate(zip(flip, SHAPE, strict=True)):
            if step < 0:
                turned[:3, 3] += affine[:3, axis] * (n - 1)
                turned[:3, axis] *= -1
        attributes = {**ATTRIBUTES, "affine": turned}
        volumes = pictures.volumes_of(
            image[(slice(None), *turn)], mask[turn], mask[turn], attributes
        )
        voxel = hottest(volumes)
        source = pictures.lesion_picture(volumes, 1, voxel)["src"].partition(",")[2]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB"), int)
        for row in range(3):
            top = row * (side + heading + gap) + heading
            rows, columns = np.nonzero(np.ptp(pixels[top : top + side, :side], axis=2) > 60)
            assert rows.mean() == pytest.approx(side / 2, abs=3)
            assert columns.mean() == pytest.approx(side / 2, abs=3)


def test_every_warning_of_resampling_and_plausibility_is_of_a_kind_to_filter_by():
    lesions = Grid((9, 9, 9), np.eye(4))
    ids = np.zeros(lesions.shape, np.uint8)
    ids[1, 1, 1], ids[8, 8, 8] = 1, 2
    merged = np.zeros((2, 2, 2), np.uint8)
    merged[0, 0, 0], merged[0, 0, 1] = 1, 2
    small = Grid((2, 2, 2), np.diag([3.0, 3, 3, 1]))
    suv = np.full(lesions.shape, 50, np.float32)
    pet = geometry.Image(suv, lesions.affine)
    kinds = {
        "tumour outside the grid": quality_warnings.lesion_losses(ids, lesions, merged, small),
        "vanished lesions": quality_warnings.lesion_losses(ids, lesions, merged * 0, lesions),
        "merged lesions": quality_warnings.lesion_losses(ids, lesions, merged, small),
        "clipped uptake": quality_warnings.clipped_uptake(suv, ids, 40, lesions),
        "PET not covered by CT": quality_warnings.uncovered_uptake(suv, lesions, small),
        "dose fraction": plausibility.dose_out_of_range(
            2.0,
            70.0,
            plausibility.summary_of(pet),
            pet,
        ),
        "mask far from uptake": plausibility.mask_far_from_uptake(suv * 0, ids, lesions),
    }
    for kind, warnings in kinds.items():
        assert kind in page_module.kinds_of(warnings)
        assert "other warnings" not in page_module.kinds_of(warnings)
    assert page_module.kinds_of(warnings_from(["a new one"], ["unheard of"])) == [
        "with warnings",
        "other warnings",
    ]
    assert page_module.kinds_of([]) == ["without warnings"]


def test_the_table_says_where_the_isocontour_is():
    assert "isocontour 41\u00a0% [ml]" in a_card()


def test_a_distance_is_told_of_two_lesions_alone():
    assert "Dmax" not in a_card()


def test_the_page_tells_what_it_was_made_from(tmp_path):
    path = tmp_path / "report.html"
    assert page_module.mark_of(path) is None
    path.write_text(a_page([]))
    assert page_module.mark_of(path) == "0f3a"


def test_the_script_shows_every_study_the_incomplete_one_too_and_rewrites_only_what_changed(
    tmp_path,
):
    images = project_zips.study_images()
    incomplete = {role: image for role, image in images.items() if role != "mask"}
    studies = {"aaaaaaa001": images, "bbbbbbb002": incomplete}
    archive = project_zips.write_zip(tmp_path / "p.zip", studies)
    page = tmp_path / "page.html"
    command = [str(archive), "-o", str(tmp_path / "p_3d.h5"), "--report", str(page)]
    assert preprocessing.main(command) == 0
    text = page.read_text()
    assert re.findall(r'<article id="(\w+)"', text) == ["bbbbbbb002", "aaaaaaa001"]
    assert "no mask" in text
    assert text.count("<img src") == 2 + N_LESIONS
    written = page.stat().st_mtime_ns
    assert preprocessing.main(command) == 0
    assert page.stat().st_mtime_ns == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.zip", "p_3d.h5", "page.html"]


def crash(*arguments):
    raise ZeroDivisionError


def test_a_study_that_cannot_be_shown_is_told_and_the_next_run_shows_it(tmp_path, capfd):
    archive = project_zips.write_zip(
        tmp_path / "p.zip", {"aaaaaaa001": project_zips.study_images()}
    )
    page = tmp_path / "page.html"
    command = [str(archive), "-o", str(tmp_path / "p_3d.h5"), "--report", str(page), "-j", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "study_card", crash)
        assert preprocessing.main(command) == 0
    assert (
        "warning: aaaaaaa001: is not shown in the report: unexpected Zero" in capfd.readouterr().err
    )
    assert "<img src" not in page.read_text()
    assert preprocessing.main(command) == 0
    assert page.read_text().count("<img src") == 2 + N_LESIONS


def test_half_a_card_of_a_killed_worker_is_not_in_the_page(tmp_path, monkeypatch, capfd):
    def killed(job):
        job.part.write_text('<article id="half"')
        os.abort()

    archive = project_zips.write_zip(
        tmp_path / "p.zip", {"aaaaaaa001": project_zips.study_images()}
    )
    page = tmp_path / "page.html"
    monkeypatch.setattr(page_module, "render_card", killed)
    command = [str(archive), "-o", str(tmp_path / "p_3d.h5"), "--report", str(page), "-j", "1"]
    assert preprocessing.main(command) == 0
    assert "aaaaaaa001: is not shown in the report: the worker" in capfd.readouterr().err
    assert re.findall(r'<article id="(\w+)"', page.read_text()) == ["aaaaaaa001"]


def test_a_page_that_cannot_be_written_leaves_the_output_as_it_was(tmp_path, capfd, monkeypatch):
    archive = project_zips.write_zip(
        tmp_path / "p.zip", {"aaaaaaa001": project_zips.study_images()}
    )
    output = tmp_path / "p_3d.h5"
    command = [str(archive), "-o", str(output), "--report", str(tmp_path / "page.html"), "-j", "1"]
    assert preprocessing.main(command) == 0
    old = output.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page_module, "write_page", full)
    assert preprocessing.main([*command, "--iso-threshold", "50"]) == 1
    assert "error: page.html cannot be written: the disk is full" in capfd.readouterr().err
    assert output.read_bytes() == old
    assert not list(tmp_path.glob(".*"))


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip("chromium and its driver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = selenium.Chrome(options, selenium.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture
def page(browser, tmp_path):
    vanished = Warning(Kind.VANISHED, "1 lesion(s) vanish by resampling")
    cards = [
        a_card("aaaaaaa001", suv_max=4.0, tmtv_ml=30.0),
        a_card(
            "bbbbbbb002",
            warnings=[vanished],
            suv_max=9,
            tmtv_ml=2.0,
        ),
        a_card("ccccccc003", suv_max=7.0, tmtv_ml=11.0),
        page_module.failed_card("ddddddd004", "failed", "no body weight"),
    ]
    path = tmp_path / "report.html"
    path.write_text(a_page(cards))
    browser.get(path.as_uri())
    return browser


def shown(page):
    script = "return [...document.querySelectorAll('article:not([hidden])')].map(a => a.id)"
    return page.execute_script(script)


def choose(page, name, value):
    page.execute_script(
        "const s = document.getElementById('-' + arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input'));",
        name,
        value,
    )


def test_the_page_opens_with_all_cards_and_no_console_error(page):
    assert len(shown(page)) == 4
    assert page.find_element("css selector", ".count").text == "4 of 4 studies; 1 skipped or failed"
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_to_complain_of(page, theme, width):
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core is not installed")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    found = axe.Axe().run(page)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert len(found["passes"]) > 30


def test_nothing_can_be_fetched_even_if_text_became_markup(page):
    script = """
        const done = arguments[0], i = new Image();
        addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
        i.onload = i.onerror = () => done("asked for");
        i.src = "file:///x.png";"""
    assert page.execute_async_script(script) == "img-src"


def test_pictures_near_the_view_are_loaded_and_have_alternative_texts(page):
    loaded = page.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done("
        "[...document.querySelectorAll('article img')]"
        ".map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 10])), 500)"
    )
    assert loaded == [[True, True]] * 9


def test_every_picture_of_every_lesion_is_printed(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    drawn = page.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done([...document.querySelectorAll("
        "'article img')].map(i => i.naturalWidth > 0 && i.offsetWidth > 0)), 500)"
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert drawn == [True] * 9


def with_lesions(n):
    """A card of a study with lesions from head to foot."""
    mask, image = np.zeros((40, 40, 120), np.uint8), np.zeros((2, 40, 40, 120), np.float16)
    lesions = []
    for number in range(n):
        mask[20:24, 20:24, 10 * number : 10 * number + 4] = 1
        place = {"label": number + 1, "mtv_ml": 9.0, "centroid_mm": (-43.0, 43.0, 30.0 * number)}
        names = ("iso_mtv_ml", "suv_max", "suv_mean", "suv_peak", "tlg_g")
        lesions.append({**place, **dict.fromkeys(names, 1.0)})
    image[0][mask > 0] = 0.2
    study = {"lesion_count": n, "tmtv_ml": 9.0 * n, "dmax_mm": 90.0, "dose_fraction": 0.4}
    measures = {"lesions": lesions, "study": study}
    masks = mask[None], mask[None]
    return page_module.study_card(
        f"{n:010x}", image, *masks, ATTRIBUTES, measures, BQML, [], page_module.MANY_LESIONS
    )


@pytest.mark.parametrize("scripts", [True, False])
def test_the_pdf_holds_every_picture_with_and_without_scripts(browser, tmp_path, scripts):
    path = tmp_path / "print.html"
    path.write_text(a_page([with_lesions(n) for n in (3, 10)]))
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(path.as_uri())
    options = {"printBackground": True, "preferCSSPageSize": True}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", options)["data"])
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    # Two projections and the lesions of each.
    assert len(re.findall(rb"/Subtype */Image", pdf)) == 2 * 2 + 3 + 10
    sheets = len(re.findall(rb"/Type */Page\b", pdf))
    assert 4 <= sheets <= 6


def test_a_printed_card_of_few_lesions_fits_a_sheet_and_of_many_is_cut_between_pictures(
    browser, tmp_path
):
    path = tmp_path / "print.html"
    path.write_text(a_page([with_lesions(3), with_lesions(10)]))
    browser.get(path.as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    sheet = {"width": round(188 / 25.4 * 96), "height": 1000, "deviceScaleFactor": 1}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**sheet, "mobile": False})
    few, many, figures = browser.execute_script(
        "const how = e => [getComputedStyle(e).breakInside, e.offsetHeight * 25.4 / 96];"
        "return [...[...document.querySelectorAll('article')].map(how),"
        "[...document.querySelectorAll('figure, tr')].map(how)]"
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert few[0] == "avoid"
    assert few[1] < 275
    assert many[0] == "auto"
    assert {how for how, _ in figures} == {"avoid"}
    assert max(height for _, height in figures) < 120


def test_no_picture_waits_for_a_script():
    for image in re.findall(r"<img [^>]*>", a_page([a_card()])):
        assert 'src="data:' in image


def test_a_page_of_a_thousand_studies_opens_and_counts_them(browser, tmp_path):
    path = tmp_path / "many.html"
    card = a_card("KEY")
    path.write_text(a_page([card.replace("KEY", f"{n:010x}") for n in range(1000)]))
    browser.get(path.as_uri())
    assert browser.find_element("css selector", ".count").text == "1000 of 1000 studies"


def test_a_row_shows_its_lesion_and_a_click_enlarges_a_picture(page):
    card = page.find_element("id", "ccccccc003")
    row = card.find_element("css selector", "tbody tr")
    row.click()
    assert row.find_element("css selector", "button").get_attribute("aria-pressed") == "true"
    figure = card.find_element("css selector", ".lesion img")
    assert figure.is_displayed()
    figure.click()
    dialog = page.find_element("css selector", "dialog")
    assert dialog.is_displayed()
    assert dialog.find_element("css selector", "img").get_attribute("src") == figure.get_attribute(
        "src"
    )
    dialog.click()
    assert not dialog.is_displayed()


def test_ratings_are_kept_by_the_browser_and_filter(page):
    page.find_element("css selector", "#aaaaaaa001 input[value=accept]").click()
    page.find_element("css selector", "#aaaaaaa001 input[type=text]").send_keys("fine")
    page.refresh()
    kept = page.find_element("css selector", "#aaaaaaa001 input[type=text]")
    assert kept.get_attribute("value") == "fine"
    choose(page, "rated", "accept")
    assert shown(page) == ["aaaaaaa001"]
    page.execute_script("localStorage.clear()")


def test_what_is_saved_is_the_accepted_keys_and_all_ratings(page):
    page.find_element("css selector", "#aaaaaaa001 input[value=accept]").click()
    page.find_element("css selector", "#bbbbbbb002 input[value=reject]").click()
    saved = page.execute_async_script("""
        const done = arguments[0], texts = [];
        URL.createObjectURL = blob => { blob.text().then(t => { texts.push(t);
            if (texts.length === 2) done(texts); }); return "#"; };
        document.getElementById("-keys").click(); document.getElementById("-ratings").click();""")
    page.execute_script("localStorage.clear()")
    keys, ratings = sorted(saved, key=len)
    assert keys == "aaaaaaa001\n"
    assert json.loads(ratings)["ratings"] == {
        "aaaaaaa001": {"verdict": "accept", "note": ""},
        "bbbbbbb002": {"verdict": "reject", "note": ""},
    }


def test_studies_called_what_objects_or_controls_are_called_are_rated_as_any(browser, tmp_path):
    names = ["__proto__", "constructor", "find", "ratings", "a <b>x'\"|&"]
    path = tmp_path / "names.html"
    path.write_text(a_page([a_card(name) for name in names]))
    browser.get(path.as_uri())
    assert shown(browser) == names
    for rate in browser.find_elements("css selector", "input[value=accept]"):
        rate.click()
    browser.refresh()
    kept = browser.find_elements("css selector", "input[value=accept]:checked")
    assert len(kept) == len(names)
    assert browser.execute_script("return Object.keys(ratings).length") == len(names)
    widths = browser.execute_script(
        "return [...document.querySelectorAll('article')].map(a => a.offsetWidth)"
    )
    assert len(set(widths)) == 1
    browser.execute_script("localStorage.clear()")


def test_distributions_name_the_study_that_is_far_out(browser, tmp_path):
    cards = [a_card(f"aaaaaaa{n:03d}", suv_max=8 + n / 10) for n in range(9)]
    path = tmp_path / "far.html"
    path.write_text(a_page([*cards, a_card("fffffffff9", suv_max=39.0)]))
    browser.get(path.as_uri())
    panel = browser.find_element("css selector", "#-overview section")
    assert "far out: fffffffff9 (39)" in panel.text
    browser.find_element("css selector", "input[aria-label='SUVmax from']").send_keys("20")
    assert shown(browser) == ["fffffffff9"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("with warnings", ["bbbbbbb002"]),
        ("without warnings", ["aaaaaaa001", "ccccccc003"]),
        ("vanished lesions", ["bbbbbbb002"]),
        ("failed", ["ddddddd004"]),
    ],
)
def test_the_filter_shows_what_it_says(page, choice, expected):
    choose(page, "show", choice)
    assert shown(page) == expected


@pytest.mark.parametrize(
    ("order", "first"),
    [("volume", "aaaaaaa001"), ("suvmax", "bbbbbbb002"), ("warnings", "ddddddd004")],
)
def test_sorting_puts_the_largest_first(page, order, first):
    choose(page, "sort", order)
    assert shown(page)[0] == first


def test_failed_studies_come_first_however_often_one_sorts(page):
    choose(page, "sort", "volume")
    choose(page, "sort", "hash")
    assert shown(page) == ["ddddddd004", "aaaaaaa001", "bbbbbbb002", "ccccccc003"]


def test_volume_and_project_filter(page):
    low = page.find_element("css selector", "input[aria-label='TMTV from']")
    low.send_keys("11")
    assert shown(page) == ["aaaaaaa001", "ccccccc003"]
    low.clear()
    low.send_keys("0")
    assert shown(page) == ["aaaaaaa001", "bbbbbbb002", "ccccccc003"]
    page.refresh()
    choose(page, "project", ATTRIBUTES["project"])
    assert shown(page) == ["aaaaaaa001", "bbbbbbb002", "ccccccc003"]


def test_nothing_hangs_out_of_a_phone_and_no_table_out_of_a_screen(page):
    def widths(width):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        script = (
            "const t = document.querySelector('.scroll'), r = document.documentElement;"
            "return [r.scrollWidth - innerWidth, t.scrollWidth - t.clientWidth]"
        )
        return page.execute_script(script)

    assert widths(390)[0] <= 0
    assert max(widths(1280)) <= 0
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_controls_stand_out_from_what_is_behind_them(page, theme):
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    script = """
        const solid = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } };
        return [...document.querySelectorAll("h1, h2, h2 span, td, th, p, li, label, figcaption, "
            + "select, input, button, footer, .count")].map(e => [e.tagName,
            getComputedStyle(e).color, solid(e), getComputedStyle(e).borderTopColor,
            solid(e.parentElement)])"""
    for tag, ink, ground, border, around in page.execute_script(script):
        assert contrast(ink, ground) >= 4.5, tag
        if tag in ("SELECT", "INPUT", "BUTTON"):
            assert contrast(border, around) >= 3, tag


def contrast(one, other):
    """Contrast ratio of two CSS colours (WCAG 2.2)."""
    luminances = []
    for colour in (one, other):
        values = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        luminances.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(luminances) / min(luminances)


def test_finding_by_hash_counts_what_is_left(page):
    choose(page, "find", "ccc")
    assert shown(page) == ["ccccccc003"]
    assert page.find_element("css selector", ".count").text == "1 of 4 studies; 1 skipped or failed"


def test_keys_step_through_the_cards(page):
    body = page.find_element("tag name", "body")
    body.send_keys("j")
    body.send_keys("j")
    page.switch_to.active_element.send_keys("k")
    assert page.switch_to.active_element.get_attribute("id") == "aaaaaaa001"


def test_the_theme_button_changes_the_background(page):
    def background():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    page.find_element("id", "-theme").click()
    assert background() != before
