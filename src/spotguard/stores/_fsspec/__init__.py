"""What stands behind `FsspecObjectStore`: one driver for each kind of back end, and their errors in our words."""
