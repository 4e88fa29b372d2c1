"""DICOM: the only room that knows pydicom. Its LPS ends here: volumes leave in RAS+ [mm]."""

import importlib

from common.packages import without


def load_library() -> None:
    """Load pydicom now, so that workers that are forked afterwards need not.

    For processes of the scripts: what else runs in it lacks decoders. requests is for downloading
    examples; of decoders gdcm's are used, and loaded when they are (`pixels.decoding_plugin`).
    """
    with without("requests", "PIL", "gdcm", "jpeg_ls", "pylibjpeg"):
        importlib.import_module("pydicom")
