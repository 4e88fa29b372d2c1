"""DICOM: the only room that knows pydicom. Its LPS ends here: volumes leave in RAS+ [mm]."""

from common.packages import without

# requests is for downloading examples. Of decoders gdcm's are used, and loaded when they are.
with without("requests", "PIL", "gdcm", "jpeg_ls", "pylibjpeg"):
    import pydicom  # noqa: F401
