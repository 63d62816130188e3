"""What users may set: dataclasses, flags, recipes, and what each setting may be."""
