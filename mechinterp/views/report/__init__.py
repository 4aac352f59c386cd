"""The report: a finding in words, and one self-contained page."""
