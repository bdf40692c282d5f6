"""Design spaces: which cases a suite runs, in which order, and which of them cannot exist."""
