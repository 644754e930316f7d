"""What a build says: ``report.json`` for programs, ``report.html`` for people, a summary for the terminal, the manifest."""
