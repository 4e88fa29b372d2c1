"""What the scripts share, in rooms. Imports run downwards on this map; nothing imports a script.

report/         page: the quality-control page, by pictures and suv_words; films of one study;
                case_table and lesion_table, by tables, and projection_list: CSV; fold_lists: for
                training; verification: which files are sound; untrusted_json: attributes as any
                file may have them
nnunet          nnU-Net's raw layout
raw/            project and layouts: the folders of a raw project; study_files, candidates,
                words and roles: which file plays which role; study: one read and checked, by
                consistency, header_planes and sidecar; pseudonyms and mapping: who is who
hdf5/           studies: training files, 3D and 2D, of chunks; parts: of one study; merge, index
                and stacks: of many; reading: what they tell without volumes; forms:
                copies or links; verify; crash_safe_file
run/            how a stage runs, whatever its studies are: cli: options; stage: plan, compute,
                replace; engine: pool or dask, each with worker; output, failures, store, lock,
                atomic, console, signals, machine
project_zip     the zip of pseudonymised studies
nifti           NIfTI files
dicom/          files and plain_headers: which there are; attributes: of a header; series,
                rescale, pixels and uneven: slices to a volume; pet: a header to SUV inputs;
                masks: rtstruct by contours and contour_gaps, seg by seg_planes
suv/            factors: of a series, from inputs, by units, timeline, nuclides, vendors, decay
                and body; names: what messages call them; provenance: how they came about;
                alternatives: what other rules give
packages        loaded without what they would load unused

Pure: arrays and frozen dataclasses in, arrays out; no paths, no formats, no log.

volumes         a study's three images to a training volume, step by step
quality_warnings   what resampling loses
plausibility    values that can't be right
masks           crops put on their images, several united
image_checks    images that are no study
lesions         lesions of a mask, their isocontours and measures
projection      rotated maximum-intensity projections, equal to scipy
resampling      images onto a grid, equal to nilearn
spline_axes     one axis of it
components      connected voxels
geometry        grids and images: where voxels lie, how their axes run
key_lists       which studies to take
splits          folds of whole patients
hashing         pseudonyms and fingerprints
errors          warnings, and how work ends early
version         of the software
"""
