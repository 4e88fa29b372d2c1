"""Which version this is."""

VERSION = "1.1.0"
SOFTWARE = f"tumorvolume {VERSION}"
