"""One file per fusion: its name is the fusion's name, toggle and report row."""
