"""Holds one folder or file for each operation or family: functions, reference.py (the specification), triton.py."""
