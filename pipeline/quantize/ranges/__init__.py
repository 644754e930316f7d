"""The range of every quantized activation: from statistics, tried at the output, to and from calibration caches."""
