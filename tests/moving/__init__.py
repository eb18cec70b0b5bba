"""Moving requests for real: servers restarted under load, with clients that check every byte. See `__main__`."""
