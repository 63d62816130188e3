"""Data sets that are read as training goes."""
