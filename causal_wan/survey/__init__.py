"""A check of a whole data set, and its report."""
