"""Video files: opened safely, decoded, written."""
