"""Makes records: runs the figures of the paper on an engine and stores what happened, raw."""
