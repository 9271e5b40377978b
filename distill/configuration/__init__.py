"""How a configuration is read: YAML, the command line over it, faults in plain English, and the help."""
