"""Profile: who is this, what is this, who is about to leave."""
