"""The steps between input and output: how alike two networks are along their depths, and how smoothly each changes."""
