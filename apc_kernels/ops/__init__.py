"""One folder an operation: `__init__.py` (the public function), `reference.py` (the mathematics), `triton.py`."""
