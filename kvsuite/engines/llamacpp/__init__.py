"""Engine `llamacpp`: real llama.cpp in this process, through its C interface."""
