"""What runs in NVIDIA's Triton Inference Server, beside the engine: `bertforge export-triton` copies these files."""
