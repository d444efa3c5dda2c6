"""Explanations of what networks look at: methods, targets, checks, and how alike the explanations of two models are."""
