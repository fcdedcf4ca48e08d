"""The dense prediction tasks: interface, registry, configuration and the built-in tasks."""
