"""The generator behind ``scripts/docs.py``: from source, command line, tests and base to Markdown."""
