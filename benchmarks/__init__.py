"""What the tools here cost and gain, measured beside other tools in one run; each script prints a markdown table."""
