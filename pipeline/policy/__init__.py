"""Rules, presets and the precision plan."""
