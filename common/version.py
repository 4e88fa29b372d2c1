"""Which version this is."""

VERSION = "1.3.0"
SOFTWARE = f"tumorvolume {VERSION}"
