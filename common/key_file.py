"""The file of the secret key that makes pseudonyms unguessable: made, read, refused."""

import argparse
import os
import secrets
from pathlib import Path
from typing import Any

from common import mapping
from common.hashing import SHORTEST_KEY

LONGEST_KEY = 1 << 16
"""What a key file may hold [bytes]; a device would have no end."""


class NewKey(argparse.Action):
    """Writes a new secret key that its owner alone may read, and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Write the key; an existing file is never overwritten."""
        try:
            mapping.create_private(Path(values), secrets.token_bytes(32))
        except OSError as error:
            parser.error(f"key file {values} cannot be made: {error.strerror}")
        parser.exit(0, f"{values}: a new key; keep it safe and secret, outputs depend on it\n")


def read_key(parser: argparse.ArgumentParser, path: Path) -> bytes:
    """Return the key, refusing one that is short or that others may read."""
    try:
        with open(path, "rb") as stream:
            key = stream.read(LONGEST_KEY + 1)
            mode = os.fstat(stream.fileno()).st_mode
    except OSError as error:
        parser.error(f"key file {path} cannot be read: {error.strerror}")
    if len(key) > LONGEST_KEY:
        parser.error(f"key file {path} has more than {LONGEST_KEY} bytes: is it another file?")
    if len(key) < SHORTEST_KEY:
        parser.error(
            f"key file {path} has {len(key)} bytes, at least {SHORTEST_KEY} are needed: "
            "make one with --new-key FILE"
        )
    if mode & 0o077:
        parser.error(f"key file {path} can be read by others: chmod 600 {path}")
    return key
