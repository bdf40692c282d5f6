"""Engine `server`: any endpoint that speaks OpenAI's protocol, seen by its client."""
