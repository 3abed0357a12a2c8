"""One store that many processes and machines share, on DuckLake."""
