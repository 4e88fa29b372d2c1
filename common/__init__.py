"""What the scripts share. Imports run one way, from the top of this map to its bottom.

running     how a stage runs
            cli: options, exit status, with path_checks, key_file and console (log, closing line);
            stage: planning, resuming, keeping, with outputs (parts, replacement), locking and
            atomic_files; parallel: studies over a multiprocessing.Pool, with
            processes (how they begin and end, a call in one), interruption (signals), machine
            (CPUs and memory) and progress, or over a cluster, by dask_cluster and dask_worker;
            worker: what a process does with one study
whole       one study from file to file
            study: raw files to three checked images, with belonging (identity, overlap) and
            header_planes (headers beside a NIfTI PET); training_study: zip to HDF5
boundaries  each the only module that knows its format
            raw_project, study_files, candidates, roles, role_hints: which file plays which role;
            image_sizes: what its images take; pseudonyms: the hash of each; mapping: the
            private CSV
            archive: the project zip; nifti, nifti_header; lesion_table: the CSV of measures
            hdf5, hdf5_chunks, hdf5_assembly, hdf5_check, steady_file: 3D and 2D files
            pictures: PNG and GIF; report, report_pictures: the quality-control page
            dicom, dicom_scan, dicom_slices, dicom_stack, dicom_pixels: series to volumes;
            pet_header, pet_frames, pet_attributes: headers to SUV inputs; dicom_seg,
            dicom_seg_planes, dicom_rtstruct, dicom_masks: masks; dicom_values, dicom_times: one
            attribute as a plain value
pure        no paths, no formats, no logging
            volumes: the steps of preprocessing; losses: what resampling loses; plausibility: of SUV
            scale and mask; resampling, with spline_axes (one axis of it) and grid (where voxels
            lie); image; lesions and components (of masks); projection and angles; contours;
            splits; hashing
            suv and its parts: pet_series, pet_units, decay, timeline, body_mass,
            suv_alternatives, suv_provenance, remarks
errors      how work ends
"""
