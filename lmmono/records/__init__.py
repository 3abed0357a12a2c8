"""Windows of text around units: which windows, and what the unit does on them."""
