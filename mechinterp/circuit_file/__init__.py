"""The circuit file: its schema, safe reading and writing, verification, comparison, other formats."""
