"""Weight formats by their MLC and Hugging Face names, applied to a loaded transformers model."""
