"""Which version this is."""

VERSION = "1.2.0"
SOFTWARE = f"tumorvolume {VERSION}"
