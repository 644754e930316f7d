"""From calibration data to ranges: readers, statistics of constant size, and the calibrators that read them."""
