"""The perplexity suite: weight formats judged over windows of text."""
