"""What a training would need on hardware that is not here: its step compiled for it and read."""
