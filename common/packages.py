"""Packages loaded without those that they would load besides, and that nothing here uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Let what is imported within find some packages missing, unless they are loaded already.

    For packages that load others where they are installed, for a part of theirs that nobody here
    calls: that can take longer than all the rest. Afterwards they can be imported as ever.
    """
    hidden = [package for package in packages if package not in sys.modules]
    # None is what an import takes for a package that is not there.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]
