"""A served model in other formats: merged, as safetensors, as GGUF. Each is compared with it."""
