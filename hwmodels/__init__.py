"""What a device is and what a model costs on it."""
