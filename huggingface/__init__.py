"""What makes the network of model.py a transformers model: text, generation, folders, other weights."""
