"""One file a benchmark: the instrument against published numbers and known answers."""
