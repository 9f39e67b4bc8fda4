"""What the analyses of a study share. See `lab.py`."""
