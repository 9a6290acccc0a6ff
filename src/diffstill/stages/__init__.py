"""The stages: one file each, one function each. Paths in, one artifact out."""
