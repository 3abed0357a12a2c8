"""The catalogue of a store: its tables, who may open it, and what SQL may read."""
