"""`apcnet check`: every file of a data set is read once (check), looked at (diagnosis), and reported on (report)."""
