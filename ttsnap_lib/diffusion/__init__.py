"""Drive a stock diffusers pipeline, part by part."""
