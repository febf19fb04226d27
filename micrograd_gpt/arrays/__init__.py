"""Which array library, which number type, where the memory is, and how a kernel stands in."""
