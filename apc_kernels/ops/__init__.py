"""A folder for an operation or a family of them: public functions, `reference.py` (the mathematics), `triton.py`."""
