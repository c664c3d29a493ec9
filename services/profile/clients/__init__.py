"""Other services, as the ports have them."""
