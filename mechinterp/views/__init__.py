"""What is drawn: figures, the report page, tables in the terminal."""
