"""Measurements: one command a question, results with hardware, versions and command."""
