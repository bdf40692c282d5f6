"""Engine `mlc`: MLC-LLM in processes of its own."""
