"""What the commands do that make a folder of a model: merge, quantize and compile, a module each."""
