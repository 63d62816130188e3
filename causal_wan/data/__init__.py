"""Rows as samples: checked, decoded, in a seeded order."""
