"""The sensitivity suite: what each layer's keys and values lose in few bits, and what a mixed assignment makes of it."""
