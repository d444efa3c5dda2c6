"""One file a study, each `run(config) -> results folder`."""
