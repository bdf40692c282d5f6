"""Engine `hf`: transformers, with policies and presses on its cache."""
