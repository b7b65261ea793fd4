"""Reads records: tables, figures, verdicts. Never makes records, save where a command is asked to run something."""

import experiments as experiments  # sees to Ctrl-C while the rest is imported
