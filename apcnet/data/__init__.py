"""Images and masks: the data sets, one file each, and what is done to a sample on its way into a network."""
