"""What portraits and items are, and how they are computed. Pure."""
