"""Scenarios: what one may say (document.py and a file a section), and reading and checking it (file.py)."""
