"""The tasks. The registry knows the built-in ones by name and imports them when they are used."""
