"""`verify`: every claim of a circuit file, checked again."""
