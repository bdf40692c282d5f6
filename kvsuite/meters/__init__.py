"""Meters: each measures one thing and says how; off its device it says null and why."""
