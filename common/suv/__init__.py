"""SUV by the rules of docs/suv.md, from plain numbers; knows no DICOM and no files."""
