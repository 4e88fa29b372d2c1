"""Which version this is."""

VERSION = "1.3.1"
SOFTWARE = f"tumorvolume {VERSION}"
