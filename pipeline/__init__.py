"""From a trained model to quantized engines, with proof."""
