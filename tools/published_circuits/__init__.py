"""Published circuits as tables of facts, and the importer that writes them as circuit files."""
