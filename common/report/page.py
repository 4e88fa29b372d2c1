"""The quality-control page of an HDF5 file: one self-contained HTML file, a card a study.

Each card is rendered by a worker into a file of its own; `write_page` puts them behind the page's
head. No network, no identity. The markup is in ``report.html.j2``.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError, Warning, warnings_from
from common.geometry import voxel_ml
from common.hashing import fingerprint
from common.hdf5.reading import read_digests
from common.hdf5.studies import read_dataset
from common.report.pictures import (
    CONTOUR_RGB,
    MASK_RGB,
    hottest_voxels,
    lesion_picture,
    projections,
    volumes_of,
)
from common.report.suv_words import (
    WORDS_OF_RULE,
    alternatives_sentence,
    rule_sentences,
    sound_provenance,
    suv_sentence,
    uptake_minutes,
)
from common.report.untrusted_json import is_number, json_array, json_object
from common.run.atomic import clear_write_errors
from common.run.engine import Engine, run_studies
from common.run.output import parts_folder, writing_beside
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome

logger = logging.getLogger("tumorvolume")


@dataclass(frozen=True)
class Card:
    """What a worker needs to render one study's card.

    The HDF5 file, and how many lesions at most have a picture of their own.
    """

    studies_file: Path
    key: str
    n_lesions: int


def write_report(
    path: Path,
    output: Path,
    sources: Mapping[str, Path],
    outcomes: Sequence[Outcome],
    engine: Engine,
    software: str,
) -> None:
    """Write the page; one that shows just these studies already is left as it is.

    Parameters
    ----------
    path, output : Path
        The page, and the stage's output, whose name it bears.
    sources : dict of key to Path
        The HDF5 file that holds each study: the new output, or what it is merged from.
    outcomes : sequence of Outcome
        Of the run that made the file: who is not in it is told with the reason.
    engine : Engine
        Who renders the cards.
    software : str
        Another version's page is made anew.
    """
    digests = in_own_process(read_digests, sources)
    absent = [outcome for outcome in outcomes if outcome.status in ("skipped", "failed")]
    listed = [[outcome.hash, outcome.status, outcome.reason] for outcome in absent]
    mark = fingerprint([software, output.stem, sorted(digests.items()), listed])
    if mark_of(path) == mark:
        return
    folder = parts_folder(output) / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    n_lesions = FEW_LESIONS if len(digests) > MANY_STUDIES else MANY_LESIONS
    jobs = [
        Job(key, "", Card(source.absolute(), key, n_lesions), part=folder / f"{key}.html")
        for key, source in sorted(sources.items())
    ]
    rendered = run_studies(render_card, jobs, engine, notes=folder)
    hidden = [outcome for outcome in rendered if outcome.status != "written"]
    for outcome in hidden:
        logger.warning("%s: is not shown in the report: %s", outcome.hash, outcome.reason)
    absent += hidden
    # A worker that was killed may have left half a card.
    shown = [
        job.part for job, outcome in zip(jobs, rendered, strict=True) if outcome.status == "written"
    ]
    cards = itertools.chain(
        (failed_card(o.hash, o.status, o.reason).encode() for o in absent),
        (card.read_bytes() for card in shown),
    )
    with writing_beside(path) as temporary, open(temporary, "wb") as stream:
        # Without its mark the next run makes the page anew.
        write_page(stream, output.stem, "" if hidden else mark, cards)


def render_card(job: Job) -> None:
    """Render one study of an HDF5 file into its part."""
    card: Card = job.work
    image, attributes = read_dataset(card.studies_file, "image", card.key)
    mask, _ = read_dataset(card.studies_file, "mask", card.key)
    mask_iso, of_contour = read_dataset(card.studies_file, "mask_iso", card.key)
    attributes = {**of_contour, **attributes}
    _check_place(attributes)
    texts, kinds = (json_array(attributes.get(name)) for name in ("warnings", "warning_kinds"))
    html = study_card(
        card.key,
        image,
        mask,
        mask_iso,
        attributes,
        sound_measures(attributes.get("measures")),
        sound_provenance(attributes.get("suv")),
        warnings_from(texts, kinds),
        card.n_lesions,
    )
    path = job.part
    with clear_write_errors(path):
        path.write_bytes(html.encode())


# --- what the file tells, whoever made it ----------------------------------------------------


def _check_place(attributes: Mapping[str, Any]) -> None:
    """Raise `StudyError` where an image does not tell its place, or what its values stand for."""
    for name, shape in (("affine", (4, 4)), ("suv_range", (2,)), ("ct_range", (2,))):
        try:
            values = np.array(attributes[name], np.float64)
            sound = values.shape == shape and bool(np.isfinite(values).all())
        except (KeyError, ValueError, TypeError):
            sound = False
        if sound:
            sound = voxel_ml(values) > 0 if name == "affine" else bool(values[0] < values[1])
        if not sound:
            raise StudyError(f"its attribute {name!r} is missing or damaged: make the file again")


def sound_measures(value: Any) -> Mapping[str, Any]:
    """Return ``lesions`` and ``study`` of a file's measures; empty where they are not all there."""
    measures = json_object(value)
    study = json_object(measures.get("study"))
    lesions = [json_object(lesion) for lesion in json_array(measures.get("lesions"))]
    numbers = [study.get(name) for name in ("lesion_count", "tmtv_ml", "dmax_mm")]
    for lesion in lesions:
        place_mm = json_array(lesion.get("centroid_mm"))
        numbers += [lesion.get(name) for name in _TOLD_OF_LESION]
        numbers += place_mm if len(place_mm) == 3 else [None]
    fraction = study.get("dose_fraction")
    if not all(map(is_number, numbers)) or not (fraction is None or is_number(fraction)):
        return {}
    return {"lesions": lesions, "study": {**study, "dose_fraction": fraction}}


# --- the markup ------------------------------------------------------------------------------

TEMPLATE = "report.html.j2"

_TOLD_OF_LESION = (
    "label", "mtv_ml", "iso_mtv_ml", "suv_max", "suv_mean", "suv_peak", "tlg_g",
)  # fmt: skip

MANY_STUDIES, FEW_LESIONS, MANY_LESIONS = 100, 3, 10
"""Of more studies fewer lesions are shown in slices, so that the page of 1,000 stays light."""

MOST_NUMBERS = 20
"""Lesions, the largest, that have their number in the projections."""

Array = NDArray[Any]


def study_card(
    key: str,
    image: Array,
    mask: Array,
    mask_iso: Array,
    attributes: Mapping[str, Any],
    measures: Mapping[str, Any],
    provenance: Mapping[str, Any],
    warnings: Sequence[Warning],
    n_lesions: int = 3,
) -> str:
    """Return the HTML of one study.

    Parameters
    ----------
    key : str
        The study's hash.
    image : (2, X, Y, Z) array
        PET and CT in [0, 1].
    mask, mask_iso : (1, X, Y, Z) arrays
    attributes : dict
        Of the image dataset: affine, ranges, project; of the isocontour's: its threshold.
    measures : dict
        ``lesions`` and ``study``; empty where they are not known.
    provenance : dict
        Of the SUV; likewise.
    warnings : sequence of Warning
    n_lesions : int
        How many lesions, the largest, are shown in slices.
    """
    volumes = volumes_of(image, mask[0], mask_iso[0], attributes)
    lesions, study = measures.get("lesions", []), measures.get("study")
    largest = sorted(lesions, key=lambda lesion: -lesion["mtv_ml"])
    # With labels kept a row is a label, of as many lesions as have it.
    by_label = mask.max() > 1 or (study is not None and study["lesion_count"] != len(lesions))
    marks = hottest_voxels(volumes, largest[:MOST_NUMBERS], by_label=by_label)
    shown = [each["label"] for each in largest[:n_lesions] if each["label"] in marks]
    minutes = uptake_minutes(provenance)
    return _template("card").render(
        key=key,
        project=str(attributes.get("project", "")),
        views=projections(volumes, marks),
        slices={number: lesion_picture(volumes, number, marks[number]) for number in shown},
        lesions=lesions,
        by_label=by_label,
        study=study,
        sentence=suv_sentence(provenance),
        rules=rule_sentences(provenance),
        alternatives=alternatives_sentence(provenance),
        warnings=warnings,
        kinds="|".join(kinds_of(warnings)),
        fraction=study and study["dose_fraction"],
        contour=_contour(attributes),
        suv_max=max((lesion["suv_max"] for lesion in lesions), default=0.0),
        minutes=None if minutes is None else round(minutes),
        weight_kg=provenance.get("weight_kg"),
    )


def kinds_of(warnings: Sequence[Warning]) -> list[str]:
    """Return what a page can be filtered by to find a study with these warnings."""
    if not warnings:
        return ["without warnings"]
    return ["with warnings", *sorted({warning.kind.value for warning in warnings})]


def _contour(attributes: Mapping[str, Any]) -> str:
    """Say where the isocontour is."""
    if "iso_suv" in attributes:
        return f"SUV {attributes['iso_suv']:g}"
    return f"{attributes['iso_threshold']:g}\u00a0%" if "iso_threshold" in attributes else ""


def failed_card(key: str, status: str, reason: str) -> str:
    """Return the HTML of a study that is not in the file."""
    return _template("failed").render(key=key, status=status, reason=reason)


def mark_of(path: Path) -> str | None:
    """Return the mark of a page, None where there is none."""
    try:
        with open(path, "rb") as stream:
            found = re.search(rb'<meta name="made-from" content="(\w+)">', stream.read(1000))
    except OSError:
        return None
    return found[1].decode() if found else None


def write_page(stream: BinaryIO, title: str, mark: str, cards: Iterable[bytes]) -> None:
    """Write the page around the cards, which are not held in memory.

    `mark` is a digest of what the page is made from, see `mark_of`.
    """
    page = _template("page").render(
        title=title,
        mark=mark,
        mask_rgb=MASK_RGB,
        contour_rgb=CONTOUR_RGB,
        rules=WORDS_OF_RULE.values(),
    )
    head, tail = page.split("<!-- cards -->")
    stream.write(head.encode())
    for card in cards:
        stream.write(card)
    stream.write(tail.encode())


def _template(part: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    source = environment.loader.get_source(environment, TEMPLATE)[0]  # type: ignore[union-attr]
    marks = dict(zip(("page", "card", "failed"), source.split("{# ---- #}"), strict=True))
    return environment.from_string(marks[part])
