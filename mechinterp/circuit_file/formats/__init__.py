"""File formats of other tools, one module each: those to write (`exports`) and those to read (`imports`)."""
