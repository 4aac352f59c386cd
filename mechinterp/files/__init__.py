"""The circuit file: its schema, reading and writing it safely, and verifying it."""
