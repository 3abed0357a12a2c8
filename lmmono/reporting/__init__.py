"""Tables and figures made from the stores of runs."""
