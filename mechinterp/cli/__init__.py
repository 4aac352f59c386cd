"""`discover-circuit`: arguments in, tables out."""
