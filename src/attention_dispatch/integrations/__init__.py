"""Other libraries' attention routed through this one. Names and habits of those libraries live only here."""
