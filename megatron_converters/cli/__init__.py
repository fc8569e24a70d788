"""The command lines: verbs, options, the plugins' contract, and what is printed."""
