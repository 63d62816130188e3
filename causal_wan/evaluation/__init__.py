"""Measures of videos, and reports on them."""
