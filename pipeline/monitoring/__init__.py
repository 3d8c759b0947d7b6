"""Progress of a run: console, metrics files, trackers."""
