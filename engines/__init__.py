"""Targets, engines, compile checks and what they compiled to. Built engines go to the build directory, never here."""
