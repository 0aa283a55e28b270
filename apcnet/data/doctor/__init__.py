"""Checks a data set: `check` reads every file once, `diagnosis` finds causes, `report` lists the findings."""
