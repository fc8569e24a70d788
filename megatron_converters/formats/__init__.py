"""Sources and targets, one folder per format. A format knows the slots of the model, never another format."""
