"""Array libraries, number types and memory, and how a kernel stands in for a definition."""
