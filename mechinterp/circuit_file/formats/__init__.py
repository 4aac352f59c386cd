"""Other tools' files, one file a format: what a circuit can be written as (`exports`), what can be read (`imports`)."""
