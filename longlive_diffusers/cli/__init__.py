"""The command line: `longlive generate | convert | quantize | bench`."""
