"""Sources and targets, one folder a format; formats know the hub of slots and never each other."""
