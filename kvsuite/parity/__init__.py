"""One table over engines: the same model, the same tokens, and whether engines that promise the same numbers give them."""
