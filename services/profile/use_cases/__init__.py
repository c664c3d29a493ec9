"""What the service does, over its ports. Pure."""
