"""What the scripts share, in rooms. Imports run downwards on this map; nothing imports a script.

run/            how a stage runs, whatever its studies are: options, log, plan, workers, output
report/         the quality-control page, films and stills
raw/            a raw project: its folders, which file plays which role, a study checked and read
hdf5/           3D and 2D training files: written, read, merged, verified
nnunet          nnU-Net's raw layout
project_zip     the zip of pseudonymised studies       nifti   NIfTI files
dicom/          DICOM series and masks to volumes, headers to SUV inputs
suv/            SUV factors and their provenance, from plain numbers

Pure: arrays and frozen dataclasses in, arrays out; no paths, no formats, no log.

volumes         a study's three images to a training volume, step by step
quality_warnings   what resampling loses       plausibility   values that can't be right
image_checks    images that are no study       masks          put on their images; united
resampling      images onto a grid, equal to nilearn; spline_axes: one axis of it
projection      rotated maximum-intensity projections, equal to scipy
lesions         lesions of a mask, their isocontours and measures; components: connected voxels
geometry        grids and images: where voxels lie, how their axes run
splits          folds of whole patients
hashing         pseudonyms and fingerprints
version, errors
"""
