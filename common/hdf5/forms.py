"""In what form an output holds its studies: copies of them, or links to the files of a store."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.hdf5.index import assemble_index, holds_links, read_stored
from common.hdf5.merge import assemble, assemble_projections
from common.hdf5.reading import read_projected
from common.hdf5.studies import read_fingerprints


@dataclass(frozen=True)
class Form:
    """How an output is written and read; to be called in a worker process.

    Attributes
    ----------
    assemble : function
        Writes the output, at a path, from the files that hold the studies, by hash.
    read_finished : function
        Returns what the studies of an output were made from, by hash.
    links : bool
        Whether it holds links.
    """

    assemble: Callable[[Path, Mapping[str, Path]], None]
    read_finished: Callable[[Path], dict[str, str]]
    links: bool

    def is_of(self, output: Path) -> bool:
        """Whether a present output has this form."""
        return holds_links(output) == self.links


def form_of(
    output: Path,
    store: Path | None,
    parameters: Mapping[str, Any],
    software: str,
    angles: Sequence[float] | None = None,
) -> Form:
    """Return the form of an output: links where there is a store, else copies.

    Parameters
    ----------
    output : Path
    store : Path, optional
    parameters, software
        Of the file.
    angles : sequence of float, optional
        Of projections [degrees]; None: the output holds volumes.
    """
    made_by: dict[str, Any] = {"parameters": parameters, "software": software}
    if store is not None:
        write_links = functools.partial(assemble_index, **made_by, output=output, angles=angles)
        return Form(write_links, functools.partial(read_stored, store), links=True)
    if angles is None:
        return Form(functools.partial(assemble, **made_by), read_fingerprints, links=False)
    write_copies = functools.partial(assemble_projections, **made_by, angles=angles)
    return Form(write_copies, read_projected, links=False)
