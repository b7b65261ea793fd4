"""Reads records: tables, figures, verdicts. Never makes records, save where a command is asked to run something."""
