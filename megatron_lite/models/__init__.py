"""Models. They choose no rank, group or collective: axes are arguments that are passed on to the layers."""
