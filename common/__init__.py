"""What the scripts share. Imports run one way, from the top of this map to its bottom.

running     cli: options, logging, exit status; stage: lock, parts, resuming, atomic replacement;
            parallel: studies over a multiprocessing.Pool; machine: CPUs and memory
whole       study: one raw study as three checked images
boundaries  each the only module that knows its format
            raw_project: which file plays which role; mapping: the private CSV; archive: the
            project zip; hdf5: 3D and 2D files, steady_file: what HDF5 writes to; pictures:
            PNG and GIF; nifti
            dicom: series to volumes; pet_header: headers to SUV inputs; dicom_masks: SEG and
            RTSTRUCT; dicom_values: one attribute as a plain value
pure        no paths, no formats, no logging
            volumes: the steps of preprocessing; losses: what resampling loses; resampling;
            image; lesions; projection; contours; splits; hashing
            suv and its parts: pet_series, pet_units, decay, timeline, body_mass,
            suv_alternatives, remarks
errors      how work ends
"""
