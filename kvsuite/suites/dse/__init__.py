"""The design-space suite: serving limits of a runtime, and what they cost."""
