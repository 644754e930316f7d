"""The stages of a build: what each one reads, which files it leaves, and when it can be skipped."""
