"""Training files: the only room that knows h5py."""
