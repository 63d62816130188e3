"""A run of distribution matching: student, critic and teacher, and the clips that the student draws."""
