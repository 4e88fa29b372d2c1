"""DICOM: the only room that knows pydicom. Its LPS ends here: volumes leave in RAS+ [mm]."""
