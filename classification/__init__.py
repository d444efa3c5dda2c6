"""Image classifiers: photographs in class folders, timm networks with the places they are listened to at, training."""
