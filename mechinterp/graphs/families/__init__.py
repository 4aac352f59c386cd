"""The kinds of nodes, one file each, behind one contract."""
