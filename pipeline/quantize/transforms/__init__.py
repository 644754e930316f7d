"""What makes a float graph easier to quantize and leaves its function as it is: smoothing, shifts, equalization."""
