"""The explorer: one HTML page of whatever results there are, for those who only read."""
