"""The quality-control page of an HDF5 file: a card a study, each rendered by a worker."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import hdf5, hdf5_assembly, outputs, report
from common.atomic_files import clear_write_errors
from common.hashing import fingerprint
from common.parallel import run_studies
from common.processes import call_apart
from common.worker import Outcome, Task

logger = logging.getLogger("tumorvolume")


@dataclass(frozen=True)
class Card:
    """What a worker needs to render one study's card: the HDF5 file, and where the card goes."""

    studies_file: Path
    key: str
    path: Path


def write_report(
    path: Path,
    output: Path,
    studies_file: Path,
    outcomes: Sequence[Outcome],
    jobs: int | None,
    software: str,
    dask: str | None = None,
) -> None:
    """Write the page; one that shows just these studies already is left as it is.

    Parameters
    ----------
    path, output, studies_file : Path
        The page; the stage's output; the HDF5 file that is to take its place, or it itself.
    outcomes : sequence of Outcome
        Of the run that made the file: who is not in it is told with the reason.
    jobs : int, optional
        Worker processes.
    software : str
        Another version's page is made anew.
    dask : str, optional
        Address of a dask scheduler whose workers do the work.
    """
    digests = call_apart(hdf5_assembly.read_all_digests, studies_file)
    absent = [outcome for outcome in outcomes if outcome.status in ("skipped", "failed")]
    listed = [[outcome.hash, outcome.status, outcome.reason] for outcome in absent]
    mark = fingerprint([software, digests, listed])
    if report.mark_of(path) == mark:
        return
    folder = outputs.parts_folder(output) / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [Task(key, Card(studies_file, key, folder / f"{key}.html")) for key in digests]
    rendered = run_studies(render_card, tasks, jobs, dask=dask, notes=folder)
    hidden = [outcome for outcome in rendered if outcome.status != "written"]
    for outcome in hidden:
        logger.warning("%s: is not shown in the report: %s", outcome.hash, outcome.reason)
    absent += hidden
    # A worker that was killed may have left half a card.
    shown = [
        task.payload.path
        for task, outcome in zip(tasks, rendered, strict=True)
        if outcome.status == "written"
    ]
    cards = itertools.chain(
        (report.failed_card(o.hash, o.status, o.reason).encode() for o in absent),
        (card.read_bytes() for card in shown),
    )
    with outputs.writing_beside(path) as temporary, open(temporary, "wb") as stream:
        # Without its mark the next run makes the page anew.
        report.write_page(stream, output.stem, "" if hidden else mark, cards)


def render_card(card: Card) -> Sequence[str]:
    """Render one study of an HDF5 file."""
    image, attributes = hdf5.read_dataset(card.studies_file, "image", card.key)
    mask, _ = hdf5.read_dataset(card.studies_file, "mask", card.key)
    mask_iso, of_contour = hdf5.read_dataset(card.studies_file, "mask_iso", card.key)
    measures, provenance, warnings = (
        json.loads(attributes[name]) for name in ("measures", "suv", "warnings")
    )
    attributes = {**of_contour, **attributes}
    html = report.study_card(
        card.key, image, mask, mask_iso, attributes, measures, provenance, warnings
    )
    with clear_write_errors(card.path):
        card.path.write_bytes(html.encode())
    return ()
